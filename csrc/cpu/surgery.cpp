#include <algorithm>
#include <deque>
#include <limits>
#include <thread>
#include <vector>

#include "cpu/lists.h"
#include "cpu/surgery_rules.h"

namespace uk {
namespace {

enum class Scope : int { global, group, tensor, row, element };

// Which sums each position of the lists is added to, and how many sums there are.
struct Segments {
  std::vector<Segment> of;
  int64_t count;
};

int64_t rows_of(const View& v) { return v.dims < 2 ? 1 : v.sizes[0]; }

View row_of(const View& v, int64_t row) {
  const char* data = static_cast<const char*>(v.data) + row * v.strides[0] * size_of(v.dtype);
  return {data, v.dtype, v.dims - 1, v.sizes + 1, v.strides + 1, v.contiguous};
}

// Rows that lie one after the other stay together as one position; others become a position each.
Segments split_rows(std::vector<View>& views, int64_t lists) {
  const size_t count = views.size() / lists;
  Segments out{{}, 0};
  std::vector<std::vector<View>> by_list(lists);
  for (size_t i = 0; i < count; ++i) {
    const View& first = views[i];
    const int64_t rows = rows_of(first);
    int64_t length = 1;
    bool together = true;
    for (int d = first.dims < 2 ? 0 : 1; d < first.dims; ++d) length *= first.sizes[d];
    for (int64_t k = 0; k < lists; ++k) together = together && views[k * count + i].contiguous;
    together = rows == 1 || length == 0 || (together && length <= kRun * kRunsPerBlock);
    for (int64_t row = 0; row < (together ? std::min<int64_t>(rows, 1) : rows); ++row) {
      out.of.push_back({out.count + row, together && rows > 1 ? length : 0});
      for (int64_t k = 0; k < lists; ++k) {
        const View& v = views[k * count + i];
        by_list[k].push_back(together ? v : row_of(v, row));
      }
    }
    out.count += rows;
  }
  views.clear();
  for (const auto& list : by_list) views.insert(views.end(), list.begin(), list.end());
  return out;
}

// May replace the views by those of rows.
Segments segments_of(const char* op, std::vector<View>& views, int64_t lists, Scope scope,
                     const std::vector<int64_t>& groups) {
  const int64_t count = int64_t(views.size()) / lists;
  if (scope == Scope::row) return split_rows(views, lists);
  Segments out{std::vector<Segment>(count), scope == Scope::tensor ? count : 1};
  if (scope == Scope::group) {
    STD_TORCH_CHECK(int64_t(groups.size()) == count, op, ": groups must have one number for each of ", count,
                    " tensors, got ", groups.size());
    for (int64_t group : groups) {
      STD_TORCH_CHECK(group >= 0 && group < count, op, ": groups must be in [0, ", count, "), got ", group);
      out.count = std::max(out.count, group + 1);
    }
  }
  for (int64_t i = 0; i < count; ++i)
    out.of[i].index = scope == Scope::tensor ? i : scope == Scope::group ? groups[i] : 0;
  return out;
}

Scope scope_of(const char* op, int64_t scope, int64_t most) {
  STD_TORCH_CHECK(scope >= 0 && scope <= most, op, ": unknown scope ", scope);
  return Scope(scope);
}

// The shape of one result a segment; no such dimension for the global scope.
Tensor per_segment(const Tensors& tensors, Scope scope, int64_t segments, std::initializer_list<int64_t> sizes) {
  std::vector<int64_t> shape;
  if (scope != Scope::global) shape.push_back(segments);
  shape.insert(shape.end(), sizes);
  return torch::stable::new_empty(tensors[0], shape, ScalarType::Double);
}

double* zeroed(Tensor& t) {
  double* p = static_cast<double*>(t.mutable_data_ptr());
  std::fill(p, p + t.numel(), 0.0);
  return p;
}

}  // namespace

// Set by set, each of tensors.size() / sets tensors -> (sets, sets) float64, one a segment.
Tensor gramian(const Tensors& tensors, int64_t sets, int64_t scope, std::vector<int64_t> groups) {
  STD_TORCH_CHECK(sets > 0 && !tensors.empty() && int64_t(tensors.size()) % sets == 0, "gramian: ", tensors.size(),
                  " tensors cannot be ", sets, " sets");
  const Scope by = scope_of("gramian", scope, int64_t(Scope::row));
  std::vector<View> views = views_of(tensors);
  check_shapes("gramian", views, views.size() / sets);
  const Segments segments = segments_of("gramian", views, sets, by, groups);
  const TensorLists lists(views, sets, segments.of);
  Tensor out = per_segment(tensors, by, segments.count, {sets, sets});
  double* full = static_cast<double*>(out.mutable_data_ptr());
  std::vector<double> sums(segments.count * sets * (sets + 1) / 2);
  const Walk walk = lists.walk();
  kernels().surgery.gramian({walk, 0, walk.blocks, sums.data(), nullptr}, pool_of(lists));
  const double* sum = sums.data();
  for (int64_t segment = 0; segment < segments.count; ++segment, full += sets * sets)
    for (int64_t a = 0; a < sets; ++a)
      for (int64_t b = a; b < sets; ++b) full[a * sets + b] = full[b * sets + a] = *sum++;
  return out;
}

// out[i] = sum over k of weights[..., k] * tensors[k * out.size() + i].
void combine_(const Tensors& out, const Tensors& tensors, const Tensor& weights, int64_t scope,
              std::vector<int64_t> groups) {
  if (out.empty() && tensors.empty()) return;
  STD_TORCH_CHECK(!out.empty() && !tensors.empty() && tensors.size() % out.size() == 0, "combine_: ", tensors.size(),
                  " tensors cannot be sets of ", out.size());
  const Scope by = scope_of("combine_", scope, int64_t(Scope::row));
  const int64_t sets = int64_t(tensors.size() / out.size());
  std::vector<View> all = writable_views_of(out);
  const std::vector<View> views = views_of(tensors);
  check_clash("combine_", all, views);
  all.insert(all.end(), views.begin(), views.end());
  check_shapes("combine_", all, out.size());
  const Segments segments = segments_of("combine_", all, sets + 1, by, groups);
  const int64_t dims = by == Scope::global ? 1 : 2;
  STD_TORCH_CHECK(weights.dim() == dims && weights.size(dims - 1) == sets &&
                      (dims == 1 || weights.size(0) == segments.count) &&
                      weights.scalar_type() == ScalarType::Double && weights.is_contiguous(),
                  "combine_: weights must be contiguous float64, ", sets, " elements for each of ", segments.count,
                  " segments");
  const TensorLists lists(all, sets + 1, segments.of);
  const Walk walk = lists.walk();
  const double* w = static_cast<const double*>(weights.const_data_ptr());
  kernels().surgery.combine({walk, 0, walk.blocks, 1, w, false}, pool_of(lists));
}

namespace {

// The numbers that the rules know, in the order of the schema.
struct ConflictOptions {
  RuleOptions rule;
  double max_norm, max_result_norm;
  double leaks[2];
  bool keep_retain, skip_nonfinite;

  ConflictOptions(int64_t number, const std::vector<double>& x, int64_t flags) {
    STD_TORCH_CHECK(number >= 0 && number <= int64_t(Rule::graddrop), "project_conflict_: unknown rule ", number);
    STD_TORCH_CHECK(x.size() == 9, "project_conflict_: options must be 9 numbers, got ", x.size());
    rule = {Rule(number), x[0], x[1], x[2], x[3], x[4], (flags & 1) != 0, (flags & 2) != 0};
    max_norm = x[5];
    max_result_norm = x[6];
    leaks[0] = x[7];
    leaks[1] = x[8];
    keep_retain = (flags & 4) != 0;
    skip_nonfinite = (flags & 8) != 0;
  }
  bool clips() const { return !std::isinf(max_norm) || !std::isinf(max_result_norm); }
};

// Two lists on their way through a projection: sums, the weights made of them, and the written result.
class Projection {
 public:
  Projection(const TensorLists& lists, const ConflictOptions& options, int64_t segments, double* gram, double* weights)
      : walk_(lists.walk()), options_(options), pool_(pool_of(lists)), count_(segments),
        sums_(segments * 3), gram_(gram), weights_(weights) {}

  // Every weight needs every sum: two passes over memory.
  void at_once() {
    look({0, walk_.blocks}, pool_);
    Products total{};
    for (int64_t i = 0; i < count_; ++i) add_to(total, of(i));
    if (options_.skip_nonfinite && !total.finite()) return leave();
    const double f = clip_factor(total.ff, options_.max_norm), r = clip_factor(total.rr, options_.max_norm);
    decide(0, count_, f, r);
    clip_result();
    act({0, walk_.blocks}, 0, count_, pool_);
  }

  // Each segment by itself: the second pass finds in the cache what the first one read. What is small enough is
  // left to one worker, so that some read while others write; the blocks of a larger tensor are shared, first to
  // look and then to act.
  void in_turn() {
    for (int64_t i = 0; i < walk_.count; ++i) add(walk_.positions[i]);
    const Pool alone{1, pool_.run};
    pool_.each(int64_t(steps_.size()), [&](int64_t i, int) { take(steps_[i], alone); });
    decide_empty();
  }

 private:
  struct Blocks {
    int64_t begin, end;
  };
  static constexpr int64_t kCached = 16 << 20;  // bytes that surely stay in the last-level cache
  static constexpr int64_t kUnit = 256 << 10;   // bytes of tensors that are too small to be handed out one by one

  // A tensor whose blocks are shared.
  struct Shared {
    const Position& position;
    std::vector<double> parts;
    std::atomic<int64_t> unread;
    std::atomic<bool> decided{false};

    explicit Shared(const Position& p) : position(p), parts(p.blocks() * 3), unread(p.blocks()) {}
  };
  // What a worker does at once: all of the segments [first, end), or one block of a tensor that is shared. Steps are
  // taken in order, so that whoever waits for others waits for what is being done.
  struct Step {
    Blocks blocks;
    int64_t first, end;
    Shared* shared;
    bool acts;
  };

  void add(const Position& p) {
    const int64_t size = size_of(p.dtypes[0]) + size_of(p.dtypes[1]), end = p.first_block + p.blocks();
    const int64_t bytes = p.elements * size;
    if (p.row > 0) {
      for (int64_t b = p.first_block; b < end; ++b) {
        const int64_t at = (b - p.first_block) * p.block, stop = std::min(p.elements, at + p.block);
        steps_.push_back({{b, b + 1}, p.segment + at / p.row, p.segment + stop / p.row, nullptr, false});
      }
    } else if (bytes > kCached / pool_.workers && pool_.workers > 1) {
      shared_.emplace_back(p);
      for (int64_t b = p.first_block; b < end; ++b) steps_.push_back({{b, b + 1}, 0, 0, &shared_.back(), false});
      for (int64_t b = end; b-- > p.first_block;) steps_.push_back({{b, b + 1}, 0, 0, &shared_.back(), true});
      joined_ = kUnit;
    } else if (!steps_.empty() && joined_ + bytes <= kUnit) {
      joined_ += bytes;
      steps_.back().blocks.end = end;
      steps_.back().end = p.segment + 1;
    } else {
      joined_ = bytes;
      steps_.push_back({{p.first_block, end}, p.segment, p.segment + 1, nullptr, false});
    }
  }

  void take(const Step& step, const Pool& alone) {
    if (step.shared == nullptr) {
      look(step.blocks, alone);
      decide(step.first, step.end, 1, 1);
      act(step.blocks, step.first, step.end, alone);
    } else if (step.acts) {
      const int64_t segment = step.shared->position.segment;
      while (!step.shared->decided.load(std::memory_order_acquire)) std::this_thread::yield();
      act(step.blocks, segment, segment + 1, alone);
    } else {
      look_shared(*step.shared, step.blocks, alone);
    }
  }
  void look_shared(Shared& s, const Blocks& b, const Pool& alone) {
    double* parts = s.parts.data() + (b.begin - s.position.first_block) * 3;
    kernels().surgery.gramian({walk_, b.begin, b.end, sums_.data(), parts}, alone);
    if (s.unread.fetch_sub(1, std::memory_order_acq_rel) > 1) return;
    const int64_t segment = s.position.segment;
    for (size_t i = 0; i < s.parts.size(); ++i) sums_[segment * 3 + i % 3] += s.parts[i];
    decide(segment, segment + 1, 1, 1);
    s.decided.store(true, std::memory_order_release);
  }
  // Segments without elements.
  void decide_empty() {
    for (int64_t i = 0; i < count_; ++i) {
      const Products p = of(i);
      if (p.ff == 0 && p.rr == 0) decide(i, i + 1, 1, 1);
    }
  }

  static void add_to(Products& total, const Products& p) {
    total.ff += p.ff;
    total.fr += p.fr;
    total.rr += p.rr;
  }
  Products of(int64_t segment) const {
    const double* s = sums_.data() + segment * 3;
    return {s[0], s[1], s[2]};
  }
  void look(const Blocks& b, const Pool& pool) {
    kernels().surgery.gramian({walk_, b.begin, b.end, sums_.data(), nullptr}, pool);
  }

  void decide(int64_t begin, int64_t end, double f, double r) {
    for (int64_t i = begin; i < end; ++i) {
      const Products p = of(i);
      const double full[] = {p.ff, p.fr, p.fr, p.rr};
      std::copy(full, full + 4, gram_ + i * 4);
      const PairWeights w = clipped_weights(options_.rule, p, f, r);
      weights_[i * 2] = w.f;
      weights_[i * 2 + 1] = w.r;
    }
  }
  void clip_result() {
    double square = 0;
    for (int64_t i = 0; i < count_; ++i) square += square_of({weights_[i * 2], weights_[i * 2 + 1]}, of(i));
    const double c = clip_factor(square < 0 ? 0 : square, options_.max_result_norm);
    for (int64_t i = 0; i < 2 * count_; ++i) weights_[i] *= c;
  }
  void act(const Blocks& b, int64_t begin, int64_t end, const Pool& pool) {
    for (int64_t i = begin; i < end; ++i) {
      if (weights_[i * 2] == 1 && weights_[i * 2 + 1] == 0) continue;
      return kernels().surgery.combine({walk_, b.begin, b.end, 0, weights_, true}, pool);
    }
  }
  void leave() {
    decide(0, count_, 1, 1);
    for (int64_t i = 0; i < count_; ++i) {
      weights_[i * 2] = 1;
      weights_[i * 2 + 1] = 0;
    }
  }

  const Walk walk_;
  const ConflictOptions& options_;
  const Pool pool_;
  const int64_t count_;
  std::vector<double> sums_;
  double *gram_, *weights_;
  std::vector<Step> steps_;
  std::deque<Shared> shared_;
  int64_t joined_ = kUnit;  // bytes of the last step, if others may join it
};

bool all_finite(const std::vector<View>& views) {
  const TensorLists lists(views, 2);
  const Walk walk = lists.walk();
  double s[3] = {};
  kernels().surgery.gramian({walk, 0, walk.blocks, s, nullptr}, pool_of(lists));
  return Products{s[0], s[1], s[2]}.finite();
}

// What a random rule reads as a third list: the number of each element, in the order of the indices and counted on
// from tensor to tensor, each beginning at a multiple of 4. An address with no memory behind it.
class Numbering {
 public:
  Numbering(const std::vector<View>& views, int64_t count) : strides_(count) {
    int64_t next = 0;
    for (int64_t i = 0; i < count; ++i) {
      const View& v = views[i];
      int64_t elements = 1;
      strides_[i].resize(v.dims);
      for (int d = v.dims; d-- > 0;) {
        strides_[i][d] = elements;
        elements *= v.sizes[d];
      }
      views_.push_back({reinterpret_cast<const void*>(next), v.dtype, v.dims, v.sizes, strides_[i].data(), true});
      next += (elements + 3) / 4 * 4;
    }
  }
  const std::vector<View>& views() const { return views_; }

 private:
  std::vector<std::vector<int64_t>> strides_;
  std::vector<View> views_;
};

// rates: the share of elements of opposite signs, one a tensor; NaN where a step is skipped.
void project_elements(std::vector<View> views, const ConflictOptions& options, int64_t seed, Tensor& rates) {
  const RuleOptions& o = options.rule;
  const int64_t count = int64_t(views.size()) / 2;
  double* rate = zeroed(rates);
  if (options.skip_nonfinite && !all_finite(views))
    return std::fill(rate, rate + count, std::numeric_limits<double>::quiet_NaN());
  const bool drop = o.rule == Rule::graddrop;
  const Numbering numbering(views, drop ? count : 0);
  std::vector<Segment> segments(count);
  for (int64_t i = 0; i < count; ++i) segments[i].index = i;
  views.insert(views.end(), numbering.views().begin(), numbering.views().end());
  const TensorLists lists(views, drop ? 3 : 2, segments);
  const bool agree = o.rule == Rule::agem || o.rule == Rule::pcgrad || options.keep_retain;
  const double conflict = o.rule == Rule::pcgrad ? 0 : o.alpha;
  kernels().surgery_elements.project({lists.walk(), drop, o.gamma, conflict, agree ? o.alpha : 0,
                                      {options.leaks[0], options.leaks[1]}, uint64_t(seed), rate},
                                     pool_of(lists));
  for (int64_t i = 0; i < count; ++i) {
    int64_t elements = 1;
    for (int d = 0; d < views[i].dims; ++d) elements *= views[i].sizes[d];
    if (elements > 0) rate[i] /= double(elements);
  }
}

void check_rule(Rule rule, Scope scope) {
  const bool elements = rule == Rule::sago || rule == Rule::graddrop;
  const bool fits = scope == Scope::element ? elements || rule == Rule::agem || rule == Rule::pcgrad : !elements;
  STD_TORCH_CHECK(fits, "project_conflict_: rule ", int(rule), " has no scope ", int(scope));
}

}  // namespace

// (Gramians, weights, rates): one of the first two a segment, or rates, one a tensor, for the scope of elements.
std::tuple<Tensor, Tensor, Tensor> project_conflict_(const Tensors& forget, const Tensors& retain, int64_t rule,
                                                     int64_t scope, std::vector<int64_t> groups,
                                                     std::vector<double> numbers, int64_t flags, int64_t seed) {
  STD_TORCH_CHECK(!forget.empty() && forget.size() == retain.size(), "project_conflict_: forget and retain must have ",
                  "the same number of tensors, at least one, got ", forget.size(), " and ", retain.size());
  const ConflictOptions options(rule, numbers, flags);
  const Scope by = scope_of("project_conflict_", scope, int64_t(Scope::element));
  check_rule(options.rule.rule, by);
  std::vector<View> all = writable_views_of(forget);
  const std::vector<View> views = views_of(retain);
  check_clash("project_conflict_", all, views);
  all.insert(all.end(), views.begin(), views.end());
  check_shapes("project_conflict_", all, forget.size());
  Tensor rates = per_segment(forget, Scope::tensor, by == Scope::element ? int64_t(forget.size()) : 0, {});
  if (by == Scope::element) {
    project_elements(all, options, seed, rates);
    return {per_segment(forget, by, 0, {2, 2}), per_segment(forget, by, 0, {2}), rates};
  }
  const Segments segments = segments_of("project_conflict_", all, 2, by, groups);
  const TensorLists lists(all, 2, segments.of);
  Tensor gram = per_segment(forget, by, segments.count, {2, 2}), weights = per_segment(forget, by, segments.count, {2});
  Projection projection(lists, options, segments.count, static_cast<double*>(gram.mutable_data_ptr()),
                        static_cast<double*>(weights.mutable_data_ptr()));
  if (by == Scope::global || by == Scope::group || options.clips() || options.skip_nonfinite)
    projection.at_once();
  else
    projection.in_turn();
  return {gram, weights, rates};
}

std::tuple<int64_t, int64_t> find_clash_of(const Tensors& out, const Tensors& tensors) {
  const Clash clash = find_clash(views_of(out), views_of(tensors));
  return {clash.out, clash.other};
}

STABLE_TORCH_LIBRARY_IMPL(unlearn_kernels, CPU, m) {
  m.impl("gramian", TORCH_BOX(&gramian));
  m.impl("combine_", TORCH_BOX(&combine_));
  m.impl("project_conflict_", TORCH_BOX(&project_conflict_));
}

STABLE_TORCH_LIBRARY_IMPL(unlearn_kernels, CompositeExplicitAutograd, m) {
  m.impl("find_clash", TORCH_BOX(&find_clash_of));
}

}  // namespace uk

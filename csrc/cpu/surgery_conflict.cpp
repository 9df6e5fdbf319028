#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/surgery_projection.h"

namespace uk {
namespace {

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

double* zeroed(Tensor& t) {
  double* p = static_cast<double*>(t.mutable_data_ptr());
  std::fill(p, p + t.numel(), 0.0);
  return p;
}

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

STABLE_TORCH_LIBRARY_IMPL(unlearn_kernels, CPU, m) {
  m.impl("project_conflict_", TORCH_BOX(&project_conflict_));
}

}  // namespace uk

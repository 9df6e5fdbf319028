#pragma once

#include <algorithm>
#include <atomic>
#include <deque>
#include <thread>
#include <vector>

#include "cpu/surgery_rules.h"
#include "cpu/surgery_segments.h"

namespace uk {

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

}  // namespace uk

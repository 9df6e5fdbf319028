#include <algorithm>

#include "tile/lists.h"

namespace uk {
namespace {

// x * step for 0 <= x < count
struct Term {
  int64_t step, count;
};

int64_t reach(const std::vector<Term>& terms) {
  int64_t sum = 0;
  for (const Term& t : terms) sum += t.step * (t.count - 1);
  return sum;
}

std::vector<Term> terms_of(const View& v) {
  std::vector<Term> out;
  for (int d = 0; d < v.dims; ++d)
    if (v.sizes[d] > 1) out.push_back({v.strides[d] * size_of(v.dtype), v.sizes[d]});
  return out;
}

// In how many ways, at most 2, the terms can make `target`. Terms are sorted by step, largest first, so that the
// search of nested strides hardly branches; where it does, `budget` ends it with 2.
int ways(const std::vector<Term>& terms, size_t from, int64_t target, int64_t reachable, int& budget) {
  if (target < 0 || target > reachable) return 0;
  if (from == terms.size()) return 1;
  if (--budget < 0) return 2;
  const Term t = terms[from];
  const int64_t rest = reachable - t.step * (t.count - 1);
  const int64_t low = target > rest ? (target - rest + t.step - 1) / t.step : 0;
  const int64_t high = std::min(t.count - 1, target / t.step);
  int found = 0;
  for (int64_t x = low; x <= high && found < 2; ++x) found += ways(terms, from + 1, target - x * t.step, rest, budget);
  return std::min(found, 2);
}

int ways(std::vector<Term>& terms, int64_t target) {
  std::sort(terms.begin(), terms.end(), [](const Term& a, const Term& b) { return a.step > b.step; });
  int budget = 10000;
  return ways(terms, 0, target, reach(terms), budget);
}

int64_t address(const View& v) { return reinterpret_cast<int64_t>(v.data); }

// One past the last byte; the address itself for a view without elements.
int64_t end_of(const View& v) {
  int64_t last = address(v);
  for (int d = 0; d < v.dims; ++d) {
    if (v.sizes[d] == 0) return address(v);
    last += (v.sizes[d] - 1) * v.strides[d] * size_of(v.dtype);
  }
  return last + size_of(v.dtype);
}

bool same(const View& a, const View& b) {
  if (a.data != b.data || a.dtype != b.dtype || a.dims != b.dims) return false;
  for (int d = 0; d < a.dims; ++d)
    if (a.sizes[d] != b.sizes[d] || (a.sizes[d] > 1 && a.strides[d] != b.strides[d])) return false;
  return true;
}

}  // namespace

bool overlap(const View& a, const View& b) {
  const int64_t end_a = end_of(a), end_b = end_of(b);
  if (end_a <= address(b) || end_b <= address(a) || end_a == address(a) || end_b == address(b)) return false;
  if (a.contiguous && b.contiguous) return true;
  // A byte of each: a + i + u = b + j + v. The right side's terms are counted from their ends, so that all add.
  std::vector<Term> terms = terms_of(a), others = terms_of(b);
  terms.push_back({1, size_of(a.dtype)});
  others.push_back({1, size_of(b.dtype)});
  const int64_t target = address(b) - address(a) + reach(others);
  for (const Term& t : others) terms.push_back(t);
  terms.erase(std::remove_if(terms.begin(), terms.end(), [](const Term& t) { return t.step == 0; }), terms.end());
  return ways(terms, target) > 0;
}

bool overlaps_itself(const View& v) {
  if (v.contiguous || end_of(v) == address(v)) return false;
  // Two indices meet where a difference other than none at all adds up to nothing.
  std::vector<Term> differences;
  int64_t target = 0;
  for (const Term& t : terms_of(v)) {
    if (t.step == 0) return true;
    differences.push_back({t.step, 2 * t.count - 1});
    target += t.step * (t.count - 1);
  }
  return ways(differences, target) > 1;
}

Clash find_clash(const std::vector<View>& out, const std::vector<View>& views) {
  struct Extent {
    int64_t begin, end, index;  // index < 0: ~index into views
  };
  std::vector<Extent> extents;
  extents.reserve(out.size() + views.size());
  for (size_t i = 0; i < out.size(); ++i) {
    if (overlaps_itself(out[i])) return {int64_t(i), -1};
    extents.push_back({address(out[i]), end_of(out[i]), int64_t(i)});
  }
  for (size_t i = 0; i < views.size(); ++i)
    if (!same(views[i], out[i % out.size()])) extents.push_back({address(views[i]), end_of(views[i]), ~int64_t(i)});
  std::sort(extents.begin(), extents.end(), [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
  for (size_t i = 0; i < extents.size(); ++i)
    for (size_t j = i + 1; j < extents.size() && extents[j].begin < extents[i].end; ++j) {
      const Extent &a = extents[i], &b = extents[j];
      if (a.index < 0 && b.index < 0) continue;
      const View& x = a.index < 0 ? views[~a.index] : out[a.index];
      const View& y = b.index < 0 ? views[~b.index] : out[b.index];
      if (!overlap(x, y)) continue;
      const Extent& written = a.index < 0 ? b : a;
      const Extent& other = a.index < 0 ? a : b;
      return {written.index, other.index < 0 ? ~other.index : -1};
    }
  return {};
}

}  // namespace uk

// The best rows of a store for each query: scores stay in registers, and what may be among the best of a range of rows
// goes to a list of its query; then the lists of each query become one.
#pragma once
#include "cuda/selection.cuh"

namespace uk::cuda {

// Vectors of one length, `outer` elements from each other.
struct Vectors {
  int64_t address;
  int code;
  int64_t count, outer, inner;
  bool aligned;  // whole groups can be loaded

  explicit Vectors(Arguments& from)
      : address(from.number()), code(int(from.number())), count(from.number()), outer(from.number()),
        inner(from.number()) {
    const int64_t size = code == kF64 ? 8 : code == kF32 ? 4 : 2;
    aligned = inner == 1 && address % 16 == 0 && outer * size % 16 == 0;
  }
};

// A block has kRows rows and kQueries queries at a time: a thread every 32nd row and kEach queries. The next part of
// the rows is on its way while this one is multiplied.
template <class T, int kEach, int kCode>
struct ScanRows {
  using Key = typename Ranks<T>::Key;
  static constexpr int kLanes = 32, kPer = 4, kRows = kLanes * kPer, kQueries = kThreads / kLanes * kEach;
  static constexpr int kDepth = kEach == 8 ? 16 : int(128 / sizeof(T)), kAcross = kDepth / kGroup, kRun = 2048;
  struct Shared {
    alignas(16) T queries[kDepth][kQueries + int(16 / sizeof(T))];
    T rows[kDepth][kRows + 1];
    Key bounds[kQueries];
    uint32_t counts[kQueries], full;
    Selection<Key> selection;
  };
  Vectors queries, rows;
  int64_t depth, keep, largest, length, tiles, parts, room;
  Key* lists;  // (queries, parts, room)

  struct Sums {
    T of[kPer][kEach];
  };
  template <int kTile>
  struct Fetched {
    static constexpr int kGroups = kTile * kAcross, kTimes = (kGroups + kThreads - 1) / kThreads;
    T x[kTimes][kGroup];

    UK_DEVICE void load(const Vectors& from, int64_t first, int64_t end, int64_t at, int64_t depth, int t) {
#pragma unroll
      for (int i = 0; i < kTimes; ++i) {
        const int g = t + i * kThreads;
        const int64_t row = first + g / kAcross, d = at + g % kAcross * kGroup, left = depth - d;
        const int n = g >= kGroups || row >= end || left <= 0 ? 0 : left < kGroup ? int(left) : kGroup;
        const int64_t begin = row * from.outer + d * from.inner;
        with_type<kCode>(from.address, from.code, [&](auto* base) {
          if (from.aligned && n == kGroup) return load_as(base + begin, n, true, x[i]);
#pragma unroll
          for (int j = 0; j < kGroup; ++j)
            x[i][j] = j < n ? T(widened(base[begin + j * from.inner])) : T(0);
        });
      }
    }
    template <int kPitch>
    UK_DEVICE void put(T (*to)[kPitch], int t) const {
#pragma unroll
      for (int i = 0; i < kTimes; ++i) {
        const int g = t + i * kThreads;
#pragma unroll
        for (int j = 0; j < kGroup; ++j)
          if (g < kGroups) to[g % kAcross * kGroup + j][g / kAcross] = x[i][j];
      }
    }
  };

  UK_DEVICE void multiply(const Shared& shared, int t, Sums& sums) const {
    const int lane = t % kLanes, first = t / kLanes * kEach;
#pragma unroll 2
    for (int d = 0; d < kDepth; ++d) {
      T x[kPer], y[kEach];
#pragma unroll
      for (int j = 0; j < kPer; ++j) x[j] = shared.rows[d][lane + j * kLanes];
#pragma unroll
      for (int i = 0; i < kEach; ++i) y[i] = shared.queries[d][first + i];
#pragma unroll
      for (int j = 0; j < kPer; ++j)
#pragma unroll
        for (int i = 0; i < kEach; ++i) sums.of[j][i] += x[j] * y[i];
    }
  }

  // Scores of rows from `row` on; sums of kRun products are added up apart.
  UK_DEVICE void score(int64_t query, int64_t row, int64_t end, Shared& shared, PerThread<Sums>& sums) const {
    PerThread<Sums> run;
    PerThread<Fetched<kRows>> ahead;
    each_thread([&](int t) {
      sums[t] = run[t] = Sums{};
      ahead[t].load(rows, row, end, 0, depth, t);
    });
    for (int64_t at = 0; at < depth; at += kDepth) {
      const int64_t next = at + kDepth;
      each_thread([&](int t) {
        ahead[t].put(shared.rows, t);
        Fetched<kQueries> q;
        q.load(queries, query, queries.count, at, depth, t);
        q.put(shared.queries, t);
      });
      each_thread([&](int t) {
        if (next < depth) ahead[t].load(rows, row, end, next, depth, t);
        multiply(shared, t, run[t]);
        if (next % kRun != 0 && next < depth) return;
#pragma unroll
        for (int j = 0; j < kPer; ++j)
#pragma unroll
          for (int i = 0; i < kEach; ++i) {
            sums[t].of[j][i] += run[t].of[j][i];
            run[t].of[j][i] = T(0);
          }
      });
    }
  }

  UK_DEVICE Key* list_of(int64_t query, int64_t part) const { return lists + (query * parts + part) * room; }

  UK_DEVICE void offer(int64_t query, int64_t part, int64_t row, int64_t end, Shared& shared, const Sums& sums,
                       int t) const {
    const int first = t / kLanes * kEach;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const Key bound = shared.bounds[first + i];
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        const int64_t n = row + t % kLanes + j * kLanes;
        const Key key = ranked(sums.of[j][i], n, largest != 0);
        if (n >= end || query + first + i >= queries.count || key <= bound) continue;
        const uint32_t place = take_up(&shared.counts[first + i], 1u);
        list_of(query + first + i, part)[place] = key;
        if (place >= room - kRows) shared.full = 1;
      }
    }
  }

  // Lists of more than `most` keys keep the best.
  UK_DEVICE void shorten(int64_t query, int64_t part, int64_t most, Shared& shared) const {
    for (int i = 0; i < kQueries; ++i) {
      const int64_t count = shared.counts[i];
      if (count <= most) continue;
      const Key bound = keep_best(list_of(query + i, part), count, keep, shared.selection);
      each_thread([&](int t) {
        if (t > 0) return;
        shared.counts[i] = uint32_t(keep);
        shared.bounds[i] = bound;
      });
    }
  }

  UK_DEVICE void operator()(int64_t block, Shared& shared) const {
    const int64_t query = block % tiles * kQueries, part = block / tiles;
    const int64_t begin = part * length, end = begin + length < rows.count ? begin + length : rows.count;
    each_thread([&](int t) {
      shared.full = 0;
      for (int i = t; i < kQueries; i += kThreads) shared.counts[i] = 0, shared.bounds[i] = 0;
    });
    for (int64_t row = begin; row < end; row += kRows) {
      PerThread<Sums> sums;
      score(query, row, end, shared, sums);
      each_thread([&](int t) { offer(query, part, row, end, shared, sums[t], t); });
      if (shared.full) {
        shorten(query, part, room - kRows, shared);
        each_thread([&](int t) {
          if (t == 0) shared.full = 0;
        });
      }
    }
    shorten(query, part, keep, shared);
    each_thread([&](int t) {
      for (int i = 0; i < kQueries && query + i < queries.count; ++i)
        for (int64_t n = shared.counts[i] + t; n < keep; n += kThreads) list_of(query + i, part)[n] = 0;
    });
  }
};

// The lists of a query as one.
template <class Key>
struct JoinedLists {
  Key* first;
  uint32_t keep;
  int64_t room;

  UK_DEVICE Key& operator[](int64_t i) const { return first[uint32_t(i) / keep * room + uint32_t(i) % keep]; }
};

template <class T>
struct JoinLists {
  using Key = typename Ranks<T>::Key;
  struct Shared {
    Selection<Key> selection;
  };
  Key* lists;
  int64_t parts, keep, room, k, largest;
  T* values;
  int64_t* indices;

  UK_DEVICE void operator()(int64_t query, Shared& shared) const {
    const JoinedLists<Key> keys{lists + query * parts * room, uint32_t(keep), room};
    if (parts * keep > k) keep_best<Key>(keys, parts * keep, k, shared.selection);
    sort_down<Key>(keys, k);
    each_thread([&](int t) {
      for (int64_t i = t; i < k; i += kThreads) {
        const Key key = keys[i];
        values[query * k + i] = score_of<T>(key, largest != 0);
        indices[query * k + i] = int64_t(0xffffffff - uint32_t(key));
      }
    });
  }
};

// Queries and rows (address, code, count, strides), depth, k, largest, length, room, lists, values and indices
// (queries, k).
inline void topk(Arguments a, Stream stream) {
  const Vectors queries(a), rows(a);
  const int64_t depth = a.number(), k = a.number(), largest = a.number(), length = a.number(), room = a.number();
  const int64_t parts = (rows.count + length - 1) / length, keep = k < length ? k : length;
  const auto join = [&](auto* lists, auto* values) {
    using T = std::remove_reference_t<decltype(*values)>;
    launch(JoinLists<T>{lists, parts, keep, room, k, largest, values, a.pointer<int64_t>()}, queries.count, stream);
  };
  const auto scan = [&](auto body) {
    body.tiles = (queries.count + body.kQueries - 1) / body.kQueries;
    launch(body, body.tiles * parts, stream);
  };
  const auto scan_with = [&](auto* lists) {
    using Key = std::remove_reference_t<decltype(*lists)>;
    const auto of = [&](auto run) { run(queries, rows, depth, keep, largest, length, int64_t(0), parts, room, lists); };
    of([&](auto... x) {
      if constexpr (sizeof(Key) == sizeof(uint64_t))
        queries.count <= 8 ? scan(ScanRows<float, 1, kAny>{x...}) : scan(ScanRows<float, 8, kAny>{x...});
      else
        queries.count <= 8 ? scan(ScanRows<double, 1, kF64>{x...}) : scan(ScanRows<double, 4, kF64>{x...});
    });
  };
  if (rows.code == kF64) {
    auto* lists = a.pointer<Ranks<double>::Key>();
    scan_with(lists);
    join(lists, a.pointer<double>());
  } else {
    auto* lists = a.pointer<Ranks<float>::Key>();
    scan_with(lists);
    join(lists, a.pointer<float>());
  }
}

}  // namespace uk::cuda

// Lists of tensors walked together, one from each list at a time: no torch, no ISA.
#pragma once
#include <vector>

#include "tile/types.h"

namespace uk {

constexpr int64_t kRun = 1024;        // elements that are read, and summed in the accumulation type, at once
constexpr int64_t kRunsPerBlock = 16;  // runs of a task, where they are tiles
constexpr int64_t kBlockBytes = 128 << 10;  // of a task in the first list, where it is flat

// A tensor as torch describes it.
struct View {
  const void* data;
  Dtype dtype;
  int dims;
  const int64_t* sizes;
  const int64_t* strides;
  bool contiguous;
};

// The tensors at the same place of every list: one shape, any dtypes and strides. A run is a range of kRun
// elements where all are dense in the same order (`flat`), otherwise a tile over the last two dimensions.
struct Position {
  const void* const* data;  // one a list
  const Dtype* dtypes;
  int64_t elements;
  int64_t runs;
  int64_t block;        // elements of a task, if flat: whole rows where each row is a segment
  int64_t first_block;  // blocks of the positions before
  int64_t segment;      // which sum it belongs to, or its first row does
  int64_t row;          // elements of a row that is a segment of its own; 0: the position is in one segment
  bool flat;
  bool uniform;   // one dtype
  bool has_f64;
  int dims;                  // 0 if flat, else at least 2
  const int64_t* sizes;      // (dims,)
  const int64_t* strides;    // (lists, dims), in elements
  int64_t tile_rows, tile_cols;

  int64_t blocks() const {
    return flat ? (elements + block - 1) / block : (runs + kRunsPerBlock - 1) / kRunsPerBlock;
  }
};

// What the kernels see: lists of tensors, cut into blocks that are handed out as tasks.
struct Walk {
  int64_t lists;
  int64_t blocks;
  int64_t count;
  const Position* positions;

  const Position& at(int64_t block) const {
    int64_t low = 0, high = count;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (positions[middle].first_block <= block ? low : high) = middle;
    }
    return positions[low];
  }
};

// Which segment the tensors of a position are summed in.
struct Segment {
  int64_t index = 0;
  int64_t row = 0;  // as in Position: the segments from `index` on are rows of so many adjacent elements
};

// What a walk points into. Not to be moved.
class TensorLists {
 public:
  // Takes views[list * count + i] together for each i; shapes must agree within an i. segments: one for each i,
  // or none for one segment. Those with rows are contiguous in every list.
  TensorLists(const std::vector<View>& views, int64_t lists, const std::vector<Segment>& segments = {});
  TensorLists(const TensorLists&) = delete;
  TensorLists& operator=(const TensorLists&) = delete;

  Walk walk() const { return {lists_, blocks_, int64_t(positions_.size()), positions_.data()}; }
  int64_t bytes() const;

 private:
  void add(const std::vector<const View*>& views, const Segment& segment);

  int64_t lists_, blocks_ = 0;
  std::vector<Position> positions_;
  std::vector<const void*> data_;
  std::vector<Dtype> dtypes_;
  std::vector<int64_t> geometry_;
};

// Whether some byte belongs to both. Exact, except that hopelessly interleaved strides count as an overlap.
bool overlap(const View& a, const View& b);

// Whether two indices of the view lead to one byte.
bool overlaps_itself(const View& view);

// Where writing to `out` would touch memory that some other view holds.
struct Clash {
  int64_t out = -1;    // index into `out`
  int64_t other = -1;  // index into `views`; -1: an element of `out` overlaps with another of the list or itself
  explicit operator bool() const { return out >= 0; }
};

// out[i] may be the very view views[list * out.size() + i]; every other overlap is a clash.
Clash find_clash(const std::vector<View>& out, const std::vector<View>& views);

}  // namespace uk

// The best of a stream of scored rows.
namespace UK_ISA {

// NaN is above every number, as in torch.topk; equal values are ordered by index.
template <class T>
struct Scored {
  T value;
  int64_t index;
};

template <class T, bool kLargest>
inline bool before(const Scored<T>& a, const Scored<T>& b) {
  const bool a_nan = a.value != a.value, b_nan = b.value != b.value;
  if (a_nan != b_nan) return a_nan == kLargest;
  if (!a_nan && a.value != b.value) return (a.value > b.value) == kLargest;
  return a.index < b.index;
}

// The `capacity` best of what was pushed, in whatever order it came: a heap with the last of them on top.
template <class T, bool kLargest>
struct Ranking {
  Scored<T>* heap;
  int64_t capacity;
  int64_t count = 0;

  // A score x that fails `passes(x)` cannot enter; NaN lets all pass.
  T threshold() const { return count < capacity ? T(NAN) : heap[0].value; }

  void push(const Scored<T>& x) {
    if (count < capacity) {
      int64_t at = count++;
      for (; at > 0 && before<T, kLargest>(heap[(at - 1) / 2], x); at = (at - 1) / 2) heap[at] = heap[(at - 1) / 2];
      heap[at] = x;
    } else if (before<T, kLargest>(x, heap[0])) {
      sink(x, count);
    }
  }

  // Leaves the heap sorted, best first.
  void sort() {
    for (int64_t size = count; size > 1;) {
      const Scored<T> last = heap[0];
      --size;
      sink(heap[size], size);
      heap[size] = last;
    }
  }

 private:
  // Puts x in the place of the top of a heap of `size`.
  void sink(const Scored<T>& x, int64_t size) {
    int64_t at = 0;
    for (int64_t child = 1; child < size; child = 2 * at + 1) {
      if (child + 1 < size && before<T, kLargest>(heap[child], heap[child + 1])) ++child;
      if (!before<T, kLargest>(x, heap[child])) break;
      heap[at] = heap[child];
      at = child;
    }
    heap[at] = x;
  }
};

}  // namespace UK_ISA

// Sums of +-x by random signs for some samples and outputs, taken up block by block of coordinates.
namespace UK_ISA {

inline constexpr int64_t kSamplesAtOnce = 32;    // that share the signs of a block
inline constexpr int64_t kCoordinateRun = 2048;  // summed in float before they are added to a double
inline constexpr int64_t kMostOutputs = 512;     // whose sums stay in cache

// Samples lane by lane, tables, running and total sums, sign words. At most 300 KB.
struct SketchMemory {
  float *x, *table, *sums;
  double* totals;
  uint64_t* words[2];
};

// Memory of `owners` ranges of at most `outputs` outputs.
struct SketchScratch {
  static constexpr int64_t kX = kSignBlock * kSamplesAtOnce, kTable = SignTables<2>::kSize;
  int64_t outputs, sums, floats;
  uk::Scratch<float> memory;
  uk::Scratch<double> totals;
  uk::Scratch<uint64_t> words;

  SketchScratch(int64_t outputs, int64_t owners)
      : outputs(outputs), sums(outputs * kSamplesAtOnce), floats(kX + kTable + sums), memory(owners * floats),
        totals(owners * sums), words(owners * 2 * outputs) {}
  SketchMemory of(int64_t owner) const {
    float* x = memory.get() + owner * floats;
    uint64_t* word = words.get() + owner * 2 * outputs;
    return {x, x + kX, x + kX + kTable, totals.get() + owner * sums, {word, word + outputs}};
  }
};

// At most kSamplesAtOnce samples by outputs first ... first + padded - 1, padded a multiple of 8. The order of the
// additions depends on the coordinate alone, not on how many are given at once.
template <int kVectors>
struct SketchTile {
  using Tables = SignTables<kVectors>;
  static constexpr int64_t kWidth = Tables::kWidth;
  PhiloxSigns signs;
  int64_t samples, first, padded;
  SketchMemory s;

  int64_t chunks() const { return (samples + kWidth - 1) / kWidth; }
  int64_t stride() const { return padded * kWidth; }

  void start() const {
    std::memset(s.sums, 0, chunks() * stride() * sizeof(float));
    std::memset(s.totals, 0, chunks() * stride() * sizeof(double));
  }

  // Coordinates begin ... begin + count - 1 of the samples are x (samples, count); begin is a multiple of a block.
  void add(const uk::Operand& x, int64_t begin, int64_t count) const {
    for (int64_t i = 0; i < count; i += kSignBlock) {
      const int64_t n = count - i < kSignBlock ? count - i : kSignBlock;
      sign_words(signs.seed, first, padded, signs.block((begin + i) / kSignBlock), s.words[0], s.words[1]);
      for (int64_t c = 0; c < chunks(); ++c) {
        const int64_t lanes = samples - c * kWidth < kWidth ? samples - c * kWidth : kWidth;
        Dense{x}.pack<float, kWidth>(s.x, c * kWidth, lanes, i, n);
        std::memset(s.x + n * kWidth, 0, (kSignBlock - n) * kWidth * sizeof(float));
        for (int half = 0; half < 2; ++half) {
          Tables::build(s.x + half * Tables::kCoordinates * kWidth, s.table);
          Tables::add(s.words[half], s.table, padded, s.sums + c * stride());
        }
      }
      if ((begin + i + kSignBlock) % kCoordinateRun == 0) flush();
    }
  }

  // out[b * ld + j] = sum * scale, for `outputs` outputs.
  void finish(float* out, int64_t ld, int64_t outputs, double scale) const {
    flush();
    for (int64_t b = 0; b < samples; ++b)
      for (int64_t j = 0; j < outputs; ++j)
        out[b * ld + j] = float(s.totals[b / kWidth * stride() + j * kWidth + b % kWidth] * scale);
  }

 private:
  void flush() const {
    for (int64_t i = 0; i < chunks() * stride(); ++i) {
      s.totals[i] += double(s.sums[i]);
      s.sums[i] = 0;
    }
  }
};

// Calls f with the narrowest tile that takes the samples.
template <class F>
inline void with_sketch_tile(const PhiloxSigns& signs, int64_t samples, int64_t first, int64_t padded, const SketchMemory& s,
                             F&& f) {
  if (samples <= SignTables<1>::kWidth)
    f(SketchTile<1>{signs, samples, first, padded, s});
  else
    f(SketchTile<2>{signs, samples, first, padded, s});
}

// Outputs a task: many share the tables, but every worker should have a task. The result does not depend on it.
inline int64_t outputs_a_task(int64_t outputs, int64_t batches, int workers) {
  const int64_t parts = (workers + batches - 1) / batches, share = (outputs + parts - 1) / parts;
  const int64_t most = share < 64 ? 64 : share < kMostOutputs ? share : kMostOutputs;
  return round_up(outputs < most ? outputs : most, 8);
}

}  // namespace UK_ISA

// Per-sample gradients of convolutions, ISA-free declarations.
#pragma once
#include "tile/types.h"

namespace uk {

// How a convolution reads its input along depth, height and width.
struct Window {
  int64_t kernel[3], stride[3], padding[3], dilation[3];

  int64_t size() const { return kernel[0] * kernel[1] * kernel[2]; }
};

// (batch, channels, depth, height, width); strides count elements.
struct Maps {
  const void* data;
  Dtype dtype;
  int64_t sizes[5], strides[5];

  int64_t batch() const { return sizes[0]; }
  int64_t channels() const { return sizes[1]; }
  int64_t positions() const { return sizes[2] * sizes[3] * sizes[4]; }
};

// Inputs and output gradients of some samples.
struct ConvBatch {
  Maps a, g;
};

struct ConvLayer {
  Window window;
  int64_t groups, in_channels, out_channels;  // of all groups
  bool bias;
  bool channels_inner;  // columns of the unfolded input run over channels first, then over the kernel

  int64_t inputs() const { return in_channels / groups * window.size(); }
  int64_t outputs() const { return out_channels / groups; }
};

enum class ConvMethod : int { direct, gram, rank1, guarded_gram };

struct ConvNorms {
  ConvLayer layer;
  ConvBatch batch;
  ConvMethod method;
  void* out;  // (batch,) float, or double for f64 inputs
};

struct ConvDots {
  ConvLayer layer;
  ConvBatch first, second;
  bool summed;  // against the sum of the second's gradients
  void* out;    // (batch1, batch2), or (batch1,) when summed
};

// Every gradient, or with weights their weighted sum.
struct ConvGrads {
  ConvLayer layer;
  ConvBatch batch;
  bool summed;
  const void* weights;  // when summed, (batch,) of the result's type
  void* weight_grad;    // (batch or 1, out_channels, in_channels / groups, kernel)
  void* bias_grad;      // (batch or 1, out_channels)
};

struct PerSampleConvKernels {
  void (*conv_sqnorms)(const ConvNorms&, const Pool&);
  void (*conv_dots)(const ConvDots&, const Pool&);
  void (*conv_grads)(const ConvGrads&, const Pool&);
};

}  // namespace uk

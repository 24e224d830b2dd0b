#include "norm_merge.cuh"

namespace dsconv {

// A block: kMergeChannels channels of one split of the tiles.
template <typename Acc>
DSCONV_KERNEL void DSCONV_BOUNDS(kBlockThreads, 2)
    norm_parts_kernel(const Acc* parts, int64_t tiles, int64_t channels, int64_t splits, double* partial) {
  DSCONV_SHARED(double, scratch, kTotalsDoubles);
  const int64_t split = blockIdx.x % splits;
  const int64_t c = blockIdx.x / splits * kMergeChannels + threadIdx.x % kMergeChannels;
  const auto load = [&](int64_t tile) -> Totals {
    const Acc* of = parts + tile * 2 * channels + c;
    return {static_cast<double>(of[0]), static_cast<double>(of[channels]),
            static_cast<double>(parts[tiles * 2 * channels + tile])};
  };
  const Totals total = merge_rows<true>(split_begin(tiles, split, splits), split_begin(tiles, split + 1, splits),
                                        c < channels, load, scratch);
  if (threadIdx.x >= kMergeChannels || c >= channels) return;
  double* to = partial + split * kPartialRows * channels + c;
  to[0] = total.first;
  to[channels] = total.second;
  to[2 * channels] = total.count;
}

LaunchStatus launch_norm_parts(const void* parts, bool doubles, int64_t tiles, int64_t channels, double* partial,
                               double* result, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const int64_t splits = parts_splits(tiles), blocks = splits * ceil_div(channels, kMergeChannels);
  const LaunchStatus status = doubles
                                  ? launch_blocks("norm_parts", norm_parts_kernel<double>, blocks, 0, cuda_stream,
                                                  static_cast<const double*>(parts), tiles, channels, splits, partial)
                                  : launch_blocks("norm_parts", norm_parts_kernel<float>, blocks, 0, cuda_stream,
                                                  static_cast<const float*>(parts), tiles, channels, splits, partial);
  if (status.error != 0) return status;
  return launch_norm_merge<true>(partial, splits, channels, result, cuda_stream);
}

}  // namespace dsconv

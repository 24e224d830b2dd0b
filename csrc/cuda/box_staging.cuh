// A chunk of channels of a box of x, and their taps, on the way from global to shared memory: piece by piece, as the
// tables of box_tables.cuh say, or in runs of whole rows that are spread afterwards (PixelBox::run_bytes).
#pragma once

#include "box_tables.cuh"
#include "depthwise.cuh"

namespace dsconv {

// kBytes at a time, asynchronously; two bytes by hand.
template <int kBytes>
DSCONV_DEVICE void copy_piece(void* target, const void* source, int valid) {
  if constexpr (kBytes == 2) {
    *static_cast<uint16_t*>(target) = valid > 0 ? *static_cast<const uint16_t*>(source) : uint16_t{0};
  } else {
    cp_async<kBytes>(target, source, valid);
  }
}

// Calls f with a compile-time number of bytes.
template <typename T, typename F>
DSCONV_DEVICE void with_copy_bytes(int bytes, const F& f) {
  switch (bytes) {
    case 16:
      return f(std::integral_constant<int, 16>{});
    case 8:
      return f(std::integral_constant<int, 8>{});
    default:
      break;
  }
  if (sizeof(T) == 4 || bytes == 4) return f(std::integral_constant<int, 4>{});
  if constexpr (sizeof(T) == 2) f(std::integral_constant<int, 2>{});
}

// One chunk of x, channels c0 ..; x points to the first channel of the box's first image. The caller commits, waits and
// puts the barriers. kChannels: of a chunk where columns lie together.
template <typename T, bool kAlongC, int kChannels = kChunkChannels<T>>
DSCONV_DEVICE void stage_x(const PixelBox& box, const DepthwiseInput<T>& in, const T* x, int32_t c0, const Span* spans,
                           unsigned char* staged) {
  constexpr int kElement = static_cast<int>(sizeof(T));
  const int32_t multiplier = static_cast<int32_t>(in.geom.multiplier), c_mid = static_cast<int32_t>(in.geom.c_mid);
  const int thread = thread_here();
  with_copy_bytes<T>(box.copy_bytes, [&](auto bytes) {
    constexpr int kBytes = decltype(bytes)::value;
    if constexpr (kAlongC) {
      constexpr int kPieces = kChunkBytes / kBytes;
      const int piece = thread % kPieces;
      const int32_t c = c0 + piece * (kBytes / kElement);
      const int there = clamped(int64_t{c_mid - c} * kElement, kBytes);
      const T* from = x + (multiplier == 1 ? c : c / multiplier);
      unsigned char* to = staged + piece * kBytes;
#pragma unroll 1
      for (int i = thread / kPieces; i < box.spans; i += kBlockThreads / kPieces) {
        const Span span = spans[i];
        const int valid = span.source < 0 ? 0 : there;
        copy_piece<kBytes>(to + (span.target >> 5), valid > 0 ? from + span.source : x, valid);
      }
    } else {
#pragma unroll 1
      for (int k = thread / 32; k < kChannels; k += kBlockThreads / 32) {
        const int32_t c = c0 + k;
        const T* plane = x + (multiplier == 1 ? c : c / multiplier) * in.strides.c;
        unsigned char* target = staged + k * box.channel_pitch;
        constexpr int kUnroll = kBytes == 2 ? 4 : 1;  // by hand: loads together, to wait once
#pragma unroll kUnroll
        for (int i = thread % 32; i < box.spans; i += 32) {
          const Span span = spans[i];
          const int valid = span.source < 0 || c >= c_mid ? 0 : span.target % 32;
          copy_piece<kBytes>(target + (span.target >> 5), valid > 0 ? plane + span.source : x, valid);
        }
      }
    }
  });
}

// One chunk of x in runs (pixel_box.h), in place of stage_x: spread_runs() puts their elements where they belong.
template <typename T, int kChannels = kChunkChannels<T>>
DSCONV_DEVICE void stage_runs(const PixelBox& box, const DepthwiseInput<T>& in, const BoxPlace& place, int32_t c0,
                              unsigned char* staged) {
  constexpr int kVec = kVecWidth<T>;
  const Geometry& g = in.geom;
  const int32_t row0 = place.row * static_cast<int32_t>(g.stride_h) - static_cast<int32_t>(g.pad_top);
  const int32_t first_row = row0 > 0 ? row0 : 0, h_in = static_cast<int32_t>(g.h_in);
  const int32_t end_row = row0 + box.in_h < h_in ? row0 + box.in_h : h_in;
  const int32_t length = (end_row - first_row) * static_cast<int32_t>(g.w_in);
  const unsigned pieces = static_cast<unsigned>(box.run_bytes) / 16,
                 count = static_cast<unsigned>(box.n) * kChannels * pieces;
  unsigned char* runs = staged + box.runs_at;
#pragma unroll 1
  for (unsigned i = static_cast<unsigned>(thread_here()); i < count; i += kBlockThreads) {
    const unsigned run = i / pieces, image = run / kChannels;
    const int32_t c = c0 + static_cast<int32_t>(run % kChannels);
    const int64_t n = place.n + image;
    if (n >= g.n || c >= g.c_in) continue;
    const int64_t start = n * in.strides.n + c * in.strides.c + int64_t{first_row} * g.w_in;
    const int32_t skipped = static_cast<int32_t>(start % kVec), first = static_cast<int32_t>(i - run * pieces) * kVec;
    const int32_t left = skipped + length - first;
    if (left <= 0) continue;
    cp_async<16>(runs + i * 16, in.x + (start - skipped + first),
                 (left < kVec ? left : kVec) * static_cast<int>(sizeof(T)));
  }
}

// The caller puts barriers before and behind it.
template <typename T, int kChannels = kChunkChannels<T>>
DSCONV_DEVICE void spread_runs(const PixelBox& box, const DepthwiseInput<T>& in, const BoxPlace& place, int32_t c0,
                               const Span* spans, unsigned char* staged) {
  const Geometry& g = in.geom;
  const int32_t row0 = place.row * static_cast<int32_t>(g.stride_h) - static_cast<int32_t>(g.pad_top);
  const int64_t first = int64_t{row0 > 0 ? row0 : 0} * g.w_in;
  const int thread = thread_here();
  const auto spread = [&](auto piece) {
    using Piece = decltype(piece);
    constexpr int kElements = static_cast<int>(sizeof(Piece) / sizeof(T));
#pragma unroll 1
    for (int k = thread / 32; k < kChannels; k += kBlockThreads / 32) {
      const int32_t c = c0 + k;
      const int32_t skipped = static_cast<int32_t>((c * in.strides.c + first) % kVecWidth<T>);
      const T* run = reinterpret_cast<const T*>(staged + box.runs_at + k * box.run_bytes) + skipped;
      unsigned char* target = staged + k * box.channel_pitch;
#pragma unroll 2
      for (int i = thread % 32; i < box.spans; i += 32) {
        const Span span = spans[i];
        Piece value = {};
        if (span.source >= 0 && c < g.c_mid) {
          if (span.target % 32 == static_cast<int>(sizeof(Piece))) {
            value = *reinterpret_cast<const Piece*>(run + span.source);
          } else if constexpr (kElements > 1) {
            value.v[0] = run[span.source];
          }
        }
        *reinterpret_cast<Piece*>(target + (span.target >> 5)) = value;
      }
    }
  };
  if (box.copy_bytes == static_cast<int32_t>(sizeof(T))) {
    spread(Vec<T, 1>{});
  } else {
    spread(Vec<T, 4 / sizeof(T)>{});
  }
}

// A run of `count` elements, and zeros behind them to `room`, a multiple of 16 bytes.
template <typename T>
DSCONV_DEVICE void stage_run(const T* source, int64_t count, int room, T* target) {
  constexpr int kPer16 = kVecWidth<T>;
  const int thread = thread_here();
  if (is_aligned(source, 16)) {
#pragma unroll 1
    for (int i = thread * kPer16; i < room; i += kBlockThreads * kPer16) {
      const int valid = clamped((count - i) * static_cast<int>(sizeof(T)), 16);
      cp_async<16>(target + i, valid > 0 ? source + i : source, valid);
    }
  } else {
#pragma unroll 1
    for (int i = thread; i < room; i += kBlockThreads) target[i] = i < count ? source[i] : T{};
  }
}

// One chunk of dw_weight, [kernel_d][channel][kernel_h * kernel_w]: each kd a kernel of its own. Zeros behind c_mid.
template <typename T>
DSCONV_DEVICE void stage_weights(const T* dw_weight, const Geometry& g, int32_t c0, T* staged) {
  const int32_t kernel_d = static_cast<int32_t>(g.kernel_d), plane_taps = static_cast<int32_t>(g.kernel_h * g.kernel_w);
  const int32_t plane = kChunkChannels<T> * plane_taps, channel_taps = kernel_d * plane_taps;
  const int64_t left = g.c_mid - c0, channels = left < kChunkChannels<T> ? left : kChunkChannels<T>;
  const T* source = dw_weight + int64_t{c0} * channel_taps;
  if (kernel_d == 1) return stage_run(source, channels * plane_taps, plane, staged);
#pragma unroll 1
  for (int i = thread_here(); i < kernel_d * plane; i += kBlockThreads) {
    const int32_t kd = i / plane, channel = (i - kd * plane) / plane_taps, tap = i - kd * plane - channel * plane_taps;
    staged[i] = channel < channels ? source[channel * channel_taps + kd * plane_taps + tap] : T{};
  }
}

// One chunk of dw_weight and, behind it, of dw_bias.
template <typename T>
DSCONV_DEVICE void stage_taps(const DepthwiseInput<T>& in, int32_t c0, T* staged) {
  const int64_t left = in.geom.c_mid - c0, channels = left < kChunkChannels<T> ? left : kChunkChannels<T>;
  stage_weights(in.dw_weight, in.geom, c0, staged);
  T* bias = staged + kChunkChannels<T> * static_cast<int32_t>(tap_count(in.geom));
  if (in.dw_bias != nullptr) {
    stage_run(in.dw_bias + c0, channels, kChunkChannels<T>, bias);
  } else {
    const int thread = thread_here();
    if (thread < kChunkChannels<T>) bias[thread] = T{};
  }
}

// Calls compute(chunk) for `chunks` of x, start(chunk) having begun to copy one of them, to place chunk % stages: as
// many ahead as there are places. All that was committed before is there too at the first call.
template <typename Start, typename Compute>
DSCONV_DEVICE void walk_chunks(int chunks, int stages, const Start& start, const Compute& compute) {
  int next = 0;
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int ahead = chunk + stages < chunks ? chunk + stages : chunks;
    if (chunk > 0 && next < ahead) __syncthreads();  // the chunk that lay there has been read
#pragma unroll 1
    for (; next < ahead; ++next) {
      start(next);
      cp_async_commit();
    }
    if (next > chunk + 1) {
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();
    compute(chunk);
  }
}

}  // namespace dsconv

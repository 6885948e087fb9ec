// Precise RoI Pooling (Jiang et al., ECCV 2018): forward, gradient to the boxes, gradient to the features.
//
// Derivation. A map F of cells k = 0 .. L - 1 has the interpolant f(x) = sum_k F[k] hat(x - k) along each axis, with
// hat(t) = max(0, 1 - |t|); F is 0 outside the map. A box [low, high] is cut into BINS bins [e, e + d] of width
// d = (high - low) / BINS, and a bin pools to the mean of f over it, once per axis:
//
//     pooled = wy' F wx,      w_k = 1/d integral over [e, e + d] of hat(x - k) dx.
//
// On one cell [k, k + 1] the interpolant is linear, so all that matters of a bin is the piece of it that lies there:
// `share`, its length over d; `mean`, its mean position in the cell, in [0, 1]; and `along`, the same position measured
// in the bin, in [0, 1]. Then, with the pieces on the left ([k - 1, k]) and on the right ([k, k + 1]) of tap k,
//
//     w_k = share_left * mean_left + share_right * (1 - mean_right).
//
// Sums of products of numbers in [0, 1]: nothing cancels, however small the bin, and the shares of a bin sum to 1, so
// that a constant map pools to its constant. Position x of bin i moves with the edges of the box as
// dx/dhigh = (i + along) / BINS and dx/dlow = 1 - dx/dhigh, and f' on [k, k + 1] is F[k + 1] - F[k]:
//
//     d pooled / d high = sum_k share_k (i + along_k) / BINS * (F[k + 1] - F[k]),
//
// a weighted sum of finite differences, again without a division by a small number. Collected by tap it is the same
// contraction with other weights, which is how it is computed: `high` and `low` below.
//
// Taps two or more from both ends of a bin have both neighbouring cells wholly inside it, hence one common weight
// (1/d, and +-1/(BINS d d) for the derivatives). Five weights describe a bin of any size: two at either end and one for
// all between. The tables are therefore small and of fixed size, and a box of any size costs its taps on the map, no
// more: ranges are clipped to the map while still floating point, before any of them becomes an integer.
//
// Precision. Everything is float32. Coordinates are taken relative to an integer cell `origin` next to the box, by a
// fused multiply-add that rounds once, so that a small box far from the origin of the map keeps its digits.
//
// Box policy. Empty or inverted: 0, gradient 0. A coordinate that is not finite, or a map that does not exist: NaN.
//
// Launch bounds name the resident blocks that registers must allow (4: 64 registers at 256 threads, 3: 80). Left to
// itself the compiler aims for more blocks and pays with spills.
//
// Built with -DPRROI_BINS=<bins per side> -DPRROI_LANES=<channels per load> -DPRROI_THREADS=<threads per block>
// -DPRROI_FLOAT32 | -DPRROI_FLOAT16 | -DPRROI_BFLOAT16. Needs no header.

constexpr int BINS = PRROI_BINS;
constexpr int LANES = PRROI_LANES;
constexpr int X = 0, Y = 1;  // axes, in the order of box coordinates
constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr float LARGEST = 3.402823466e38f;
constexpr float SMALLEST = 1.175494351e-38f;
// Edges beyond this many pixels are pulled in to it, which keeps all arithmetic finite. What such a box pools to is
// below the rounding of any feature either way.
constexpr float FAR_AWAY = 1e30f;

// ---- Storage: features are stored in 32 or 16 bits; arithmetic is float32. ----

#if defined(PRROI_FLOAT32)
using Storage = float;
__device__ __forceinline__ float widen(Storage value) { return value; }
__device__ __forceinline__ Storage narrow(float value) { return value; }
#elif defined(PRROI_FLOAT16)
using Storage = unsigned short;
__device__ __forceinline__ float widen(Storage bits) {
#ifdef __CUDA_ARCH__
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
#else
    return half_to_float(bits);
#endif
}
__device__ __forceinline__ Storage narrow(float value) {
#ifdef __CUDA_ARCH__
    Storage bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
#else
    return float_to_half(value);
#endif
}
#elif defined(PRROI_BFLOAT16)
using Storage = unsigned short;
__device__ __forceinline__ float widen(Storage bits) { return __uint_as_float(static_cast<unsigned>(bits) << 16); }
__device__ __forceinline__ Storage narrow(float value) {
    if (value != value) return 0x7fc0;  // rounding the bits of a NaN could carry into infinity
    const unsigned bits = __float_as_uint(value);
    return static_cast<Storage>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);  // to nearest, ties to even
}
#else
#error "define PRROI_FLOAT32, PRROI_FLOAT16 or PRROI_BFLOAT16"
#endif

// LANES neighbouring channels, moved by one load.
struct alignas(sizeof(Storage) * LANES) Pack {
    Storage lane[LANES];
};

// ---- Geometry: where a box lies on its map. ----

// One axis of a box, in cells. Bin i is [start + i * bin, start + (i + 1) * bin], relative to `origin`.
struct Span {
    float origin, start, bin;
    int cells;  // of the map
};

// One feature map: cells of `height` rows from row `first` of the table.
struct Map {
    long long first;
    int height, width;
    float stride;
    bool exists;
};

struct Maps {
    const int* __restrict__ sizes;          // (count, 2) height and width
    const long long* __restrict__ offsets;  // (count,) first row in the table
    const float* __restrict__ strides;      // (count,) pixels per cell
    int count;
    long long rows;  // of the table
};

__device__ __forceinline__ bool finite(float value) { return fabsf(value) <= LARGEST; }

// Nothing is read before it is known to be there, and a map that reaches out of the table does not exist.
__device__ __forceinline__ Map map_at(const Maps& maps, int index) {
    Map map = {0, 0, 0, 1.f, false};
    if (index < 0 || index >= maps.count) return map;
    map.first = maps.offsets[index];
    map.height = maps.sizes[2 * index];
    map.width = maps.sizes[2 * index + 1];
    map.stride = maps.strides[index];
    const long long area = static_cast<long long>(map.height) * map.width;
    map.exists = map.height >= 0 && map.width >= 0 && map.first >= 0 && map.first <= maps.rows - area &&
                 map.stride > 0.f && finite(map.stride);
    return map;
}

// What a box pools to where it has no taps: 0, or NaN where box or map is invalid.
__device__ __forceinline__ float blank_of(const Map& map, const float* __restrict__ box) {
    const bool sound = map.exists && finite(box[0]) && finite(box[1]) && finite(box[2]) && finite(box[3]);
    return sound ? 0.f : __uint_as_float(0x7fc00000u);
}

__device__ __forceinline__ bool has_taps(float blank, const float* __restrict__ box) {
    return blank == 0.f && box[2] > box[0] && box[3] > box[1];
}

__device__ __forceinline__ Span span_of(const Map& map, const float* __restrict__ box, int axis, float shift) {
    const float low = fminf(fmaxf(box[axis], -FAR_AWAY), FAR_AWAY);
    const float high = fminf(fmaxf(box[axis + 2], -FAR_AWAY), FAR_AWAY);
    Span span;
    span.cells = axis == X ? map.width : map.height;
    span.origin = fminf(fmaxf(floorf(low / map.stride - shift), -1.f), static_cast<float>(span.cells));
    span.start = fmaf(-(span.origin + shift), map.stride, low) / map.stride;
    span.bin = fmaxf((high - low) / (map.stride * BINS), SMALLEST);  // never 0, also where denormals are flushed
    return span;
}

__device__ __forceinline__ float edge_of(const Span& span, int bin) { return fmaf(bin, span.bin, span.start); }

// ---- Weights. ----

// The piece of a bin [start, start + width] that lies in the cell [0, 1].
struct Piece {
    float share, mean, along;
};

__device__ __forceinline__ Piece piece_of(float start, float width) {
    const float before = fmaxf(-start, 0.f), from = fmaxf(start, 0.f);
    const float length = fmaxf(fminf(width - before, 1.f - from), 0.f);
    return {length / width, from + 0.5f * length, fminf((before + 0.5f * length) / width, 1.f)};
}

// What tap `cell` (relative to the origin of the span) weighs in a bin, and how that changes with the box's two edges.
struct Tap {
    float weight, low, high;
};

__device__ __forceinline__ Tap tap_of(const Span& span, int bin, float cell) {
    const float edge = edge_of(span, bin);
    const Piece left = piece_of(edge - (cell - 1.f), span.bin), right = piece_of(edge - cell, span.bin);
    const float left_high = left.share * (bin + left.along) / BINS, right_high = right.share * (bin + right.along) / BINS;
    Tap tap;
    tap.weight = left.share * left.mean + right.share * (1.f - right.mean);
    tap.high = left_high - right_high;
    tap.low = (left.share - left_high) - (right.share - right_high);
    return tap;
}

// Weights of a bin by slot: the first two taps, all between, the last two. Fewer than five taps fill the last slots.
constexpr int SLOTS = 5;
struct Bin {
    int first, taps;  // cells of the map under the bin
    float weight[SLOTS];
};
struct Slope {
    float low[SLOTS], high[SLOTS];
};

__device__ __forceinline__ int slot_of(int tap, int taps) { return max(min(tap, 2), tap + SLOTS - taps); }
__device__ __forceinline__ int tap_in(int slot, int taps) {
    return taps >= SLOTS && slot <= 2 ? slot : slot + taps - SLOTS;
}

// Fill the tables of a box, bins[axis][bin], with all threads of the block.
template <bool WITH_SLOPES>
__device__ __forceinline__ void fill(const Map& map, const float* __restrict__ box, float shift, bool pooled,
                                     Bin (*bins)[BINS], Slope (*slopes)[BINS]) {
    for (int entry = threadIdx.x; entry < 2 * BINS * SLOTS; entry += blockDim.x) {
        const int slot = entry % SLOTS, index = entry / SLOTS % BINS, axis = entry / SLOTS / BINS;
        Bin& bin = bins[axis][index];
        const Span span = span_of(map, box, axis, shift);
        const float cells = span.cells, edge = edge_of(span, index);
        const float first = fminf(fmaxf(floorf(edge) + span.origin, 0.f), cells);
        const float last = fmaxf(fminf(ceilf(edge + span.bin) + span.origin, cells - 1.f), -1.f);
        const int taps = pooled ? static_cast<int>(fmaxf(last - first + 1.f, 0.f)) : 0;
        if (slot == 0) bin.first = static_cast<int>(first), bin.taps = taps;
        const int tap = tap_in(slot, taps);
        if (tap < 0) continue;
        const Tap weights = tap_of(span, index, first - span.origin + tap);
        bin.weight[slot] = weights.weight;
        if (WITH_SLOPES) slopes[axis][index].low[slot] = weights.low, slopes[axis][index].high[slot] = weights.high;
    }
}

// ---- Forward. Block (box, slice): its threads share the bins and channels of one box with those of other slices. ----

extern "C" __global__ void __launch_bounds__(PRROI_THREADS, 4) prroi_forward(
    const Pack* __restrict__ table, long long rows, int packs, const int* __restrict__ sizes,
    const long long* __restrict__ offsets, const float* __restrict__ strides, int maps, const float* __restrict__ boxes,
    const int* __restrict__ map_index, float shift, Pack* __restrict__ output) {
    __shared__ Bin bins[2][BINS];
    const long long box = blockIdx.x;
    const float* corners = boxes + 4 * box;
    const Map map = map_at({sizes, offsets, strides, maps, rows}, map_index[box]);
    const float blank = blank_of(map, corners);
    fill<false>(map, corners, shift, has_taps(blank, corners), bins, nullptr);
    __syncthreads();
    const int items = BINS * BINS * packs;
    for (int item = blockIdx.y * blockDim.x + threadIdx.x; item < items; item += gridDim.y * blockDim.x) {
        const int cell = item / packs, pack = item - cell * packs;
        const Bin &by = bins[Y][cell / BINS], &bx = bins[X][cell % BINS];
        float total[LANES];
#pragma unroll
        for (int lane = 0; lane < LANES; ++lane) total[lane] = blank;
#pragma unroll 1
        for (int ty = 0; ty < by.taps; ++ty) {
            const long long row = map.first + static_cast<long long>(by.first + ty) * map.width + bx.first;
            const Pack* source = table + row * packs + pack;
            float sum[LANES] = {};
#pragma unroll 4
            for (int tx = 0; tx < bx.taps; ++tx, source += packs) {
                const Pack value = *source;
                const float weight = bx.weight[slot_of(tx, bx.taps)];
#pragma unroll
                for (int lane = 0; lane < LANES; ++lane) sum[lane] = fmaf(weight, widen(value.lane[lane]), sum[lane]);
            }
            const float weight = by.weight[slot_of(ty, by.taps)];
#pragma unroll
            for (int lane = 0; lane < LANES; ++lane) total[lane] = fmaf(weight, sum[lane], total[lane]);
        }
        Pack result;
#pragma unroll
        for (int lane = 0; lane < LANES; ++lane) result.lane[lane] = narrow(total[lane]);
        output[box * items + item] = result;
    }
}

// ---- Gradient to the boxes. One block per box, sums in registers, one store: no atomics, the same bits every time. ----

extern "C" __global__ void __launch_bounds__(PRROI_THREADS, 3) prroi_backward_boxes(
    const Pack* __restrict__ grad, const Pack* __restrict__ table, long long rows, int packs,
    const int* __restrict__ sizes, const long long* __restrict__ offsets, const float* __restrict__ strides, int maps,
    const float* __restrict__ boxes, const int* __restrict__ map_index, float shift, float* __restrict__ grad_boxes) {
    __shared__ Bin bins[2][BINS];
    __shared__ Slope slopes[2][BINS];
    __shared__ float partial[PRROI_THREADS / WARP][4];
    const long long box = blockIdx.x;
    const float* corners = boxes + 4 * box;
    const Map map = map_at({sizes, offsets, strides, maps, rows}, map_index[box]);
    const float blank = blank_of(map, corners);
    fill<true>(map, corners, shift, has_taps(blank, corners), bins, slopes);
    __syncthreads();
    float edge[4] = {};  // derivatives by x1, y1, x2, y2
    const int items = BINS * BINS * packs;
    for (int item = threadIdx.x; item < items; item += blockDim.x) {
        const int cell = item / packs, pack = item - cell * packs;
        const Bin &by = bins[Y][cell / BINS], &bx = bins[X][cell % BINS];
        const Slope &dy = slopes[Y][cell / BINS], &dx = slopes[X][cell % BINS];
        const Pack upstream = grad[box * items + item];
#pragma unroll 1
        for (int ty = 0; ty < by.taps; ++ty) {
            const long long row = map.first + static_cast<long long>(by.first + ty) * map.width + bx.first;
            const Pack* source = table + row * packs + pack;
            float sum = 0.f, low = 0.f, high = 0.f;
#pragma unroll 4
            for (int tx = 0; tx < bx.taps; ++tx, source += packs) {
                const Pack value = *source;
                float inner = 0.f;  // everything below is linear in it, so channels are summed first
#pragma unroll
                for (int lane = 0; lane < LANES; ++lane)
                    inner = fmaf(widen(upstream.lane[lane]), widen(value.lane[lane]), inner);
                const int slot = slot_of(tx, bx.taps);
                sum = fmaf(bx.weight[slot], inner, sum);
                low = fmaf(dx.low[slot], inner, low);
                high = fmaf(dx.high[slot], inner, high);
            }
            const int slot = slot_of(ty, by.taps);
            edge[0] = fmaf(by.weight[slot], low, edge[0]);
            edge[1] = fmaf(dy.low[slot], sum, edge[1]);
            edge[2] = fmaf(by.weight[slot], high, edge[2]);
            edge[3] = fmaf(dy.high[slot], sum, edge[3]);
        }
    }
#pragma unroll
    for (int side = 0; side < 4; ++side) {
        for (int step = WARP / 2; step > 0; step /= 2) edge[side] += __shfl_down_sync(ALL_LANES, edge[side], step);
        if (threadIdx.x % WARP == 0) partial[threadIdx.x / WARP][side] = edge[side];
    }
    __syncthreads();
    if (threadIdx.x < 4) {
        float sum = blank;
        for (unsigned warp = 0; warp < blockDim.x / WARP; ++warp) sum += partial[warp][threadIdx.x];
        grad_boxes[4 * box + threadIdx.x] = sum / map.stride;  // from cells to pixels
    }
}

// ---- Gradient to the features. Gathered: block (row of the table, slice of channels) looks through all boxes, in
// order, for those that touch its cell. No atomics, every row stored once, the same bits every time. ----

// Whether a tap at `cell` can weigh in any bin of the span.
__device__ __forceinline__ bool reaches(const Span& span, float cell) {
    cell -= span.origin;
    return span.start < cell + 1.f && edge_of(span, BINS) > cell - 1.f;
}

extern "C" __global__ void __launch_bounds__(PRROI_THREADS, 4) prroi_backward_table(
    const Pack* __restrict__ grad, long long rows, int packs, const int* __restrict__ sizes,
    const long long* __restrict__ offsets, const float* __restrict__ strides, int maps, const float* __restrict__ boxes,
    const int* __restrict__ map_index, int count, float shift, Pack* __restrict__ grad_table) {
    __shared__ unsigned found[PRROI_THREADS / WARP];
    __shared__ float weights[2][BINS];
    const Maps all = {sizes, offsets, strides, maps, rows};
    const long long row = blockIdx.x;
    const int pack = blockIdx.y * blockDim.x + threadIdx.x;
    float total[LANES] = {};
    for (int begin = 0; begin < count; begin += blockDim.x) {
        // Each thread asks one box.
        const int asked = begin + threadIdx.x;
        bool touched = false;
        if (asked < count) {
            const Map map = map_at(all, map_index[asked]);
            const long long at = row - map.first;
            if (map.exists && at >= 0 && at < static_cast<long long>(map.height) * map.width) {
                const float* corners = boxes + 4ll * asked;
                const int y = static_cast<int>(at) / map.width, x = static_cast<int>(at) % map.width;
                touched = has_taps(blank_of(map, corners), corners) && reaches(span_of(map, corners, X, shift), x) &&
                          reaches(span_of(map, corners, Y, shift), y);
            }
        }
        const unsigned votes = __ballot_sync(ALL_LANES, touched);
        if (threadIdx.x % WARP == 0) found[threadIdx.x / WARP] = votes;
        __syncthreads();
        // All threads add the boxes that were found, one after another.
        for (unsigned warp = 0; warp < blockDim.x / WARP; ++warp) {
            for (unsigned left = found[warp]; left; left &= left - 1) {
                const long long box = begin + warp * WARP + __ffs(left) - 1;
                for (int entry = threadIdx.x; entry < 2 * BINS; entry += blockDim.x) {
                    const int axis = entry / BINS, bin = entry % BINS;
                    const Map map = map_at(all, map_index[box]);
                    const Span span = span_of(map, boxes + 4 * box, axis, shift);
                    const int at = static_cast<int>(row - map.first);
                    const int cell = axis == X ? at % map.width : at / map.width;
                    weights[axis][bin] = tap_of(span, bin, cell - span.origin).weight;
                }
                __syncthreads();
#pragma unroll 1
                for (int bin = 0; pack < packs && bin < BINS * BINS; ++bin) {
                    const float weight = weights[Y][bin / BINS] * weights[X][bin % BINS];
                    if (weight == 0.f) continue;
                    const Pack upstream = grad[(box * BINS * BINS + bin) * packs + pack];
#pragma unroll
                    for (int lane = 0; lane < LANES; ++lane)
                        total[lane] = fmaf(weight, widen(upstream.lane[lane]), total[lane]);
                }
                __syncthreads();
            }
        }
        __syncthreads();  // nobody asks the next boxes while another still reads who was found
    }
    if (pack >= packs) return;
    Pack result;
#pragma unroll
    for (int lane = 0; lane < LANES; ++lane) result.lane[lane] = narrow(total[lane]);
    grad_table[row * packs + pack] = result;
}

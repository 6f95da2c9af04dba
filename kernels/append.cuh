// The append of one token: the row in front of the window becomes the last packed one, and the new row takes its place in the ring.
//
// Is: one row of each sequence, kv head and stream, by a whole block, for its latency: everything that memory has is asked for at once, and
// codes go into the row block's bytes as these lie. Bytes and codes are those of encode.cuh. Is not: for rows that are not packed, nor for those
// that leave when statistics of a block come due (append_block.cuh, in a step that is replayed).
// Grid: 2 streams × kv heads × batch; block: 256 threads. In attend_once.cuh some blocks of 128 threads do the same for a token that enters with it.
#pragma once
#include "quantize.cuh"

namespace skvq {

constexpr int append_threads = 256;

/// y_j = Σ_c M[j][c]·u_c, from 0, in the order of c, by a block: a thread has one output and a slice of the columns, and adds to what the slice before
/// has found. Elements of four runs of 16 columns are on their way meanwhile, those of `start` before anything else.
template <int D, int threads>
struct BlockProduct {
    static constexpr int run = 16, runs = D / run;
    static constexpr int slices = threads / D < runs ? threads / D : runs;
    /// Runs of a slice; the last slice may have fewer.
    static constexpr int own = (runs + slices - 1) / slices, ahead = own < 4 ? own : 4, early = (ahead + 1) / 2;
    const float* columns;  // of the slice, from the thread's output on
    int slice, output;
    float elements[ahead][run];

    __device__ __forceinline__ void start(const float* matrix) {
        slice = threadIdx.x / D, output = threadIdx.x % D;
        columns = matrix + slice * (own * run * D) + output;
        for_each<early>([&](auto index) { load<decltype(index)::value>(); });
    }
    __device__ __forceinline__ void go_on() {
        for_each<ahead - early>([&](auto index) { load<early + decltype(index)::value>(); });
    }
    __device__ __forceinline__ bool has(int i) const { return slice < slices && slice * own + i < runs; }
    template <int I>
    __device__ __forceinline__ void load() {
        if (!has(I)) return;
#pragma unroll
        for (int c = 0; c < run; ++c) elements[I % ahead][c] = load_here(columns + (I * run + c) * D);
    }
    /// u, y: [D] in shared memory, u behind a barrier; a barrier must follow.
    __device__ __forceinline__ void multiply(const float* u, float* y) {
        float sum = 0.0f;
#pragma unroll 1
        for (int turn = 0; turn < slices; ++turn) {
            if (turn) __syncthreads();
            if (slice != turn) continue;
            if (turn) sum = y[output];
            for_each<own>([&](auto index) {
                constexpr int i = decltype(index)::value;
                if (has(i)) {
#pragma unroll
                    for (int c = 0; c < run; ++c) sum = __fadd_rn(sum, __fmul_rn(elements[i % ahead][c], u[(turn * own + i) * run + c]));
                }
                if constexpr (i + ahead < own) load<i + ahead>();
            });
            y[output] = sum;
        }
    }
};

/// The bytes of a row block with the codes of row `row` (0 … 15): earlier rows keep theirs, later ones do not exist and have code 0.
template <class L, int threads>
__device__ __forceinline__ void put_row(u8* bytes, int row, const u8* codes, bool finite) {
    for (int index = threadIdx.x; index < L::block_bytes; index += threads) {
        const int lane = index % 32, byte = index / 32;
        u8& here = bytes[lane_byte<L>(lane, byte)];
        const int old = L::is_ternary ? page_byte<L>(byte, here) : here;
        here = lane_byte_of<L>(lane, byte, [&](int other, int code, int bits, int drop, int size, int at) {
            const int mask = (1 << size) - 1;
            if (other < row) return L::is_ternary ? ternary_digit(old, at) : old >> at & mask;
            return page_code<L>(bits, other, other == row && finite ? codes[code] : 0) >> drop & mask;
        });
    }
}

/// What a block needs of shared memory.
template <class L>
struct AppendSpace {
    static constexpr int D = L::head_dim, words = L::block_bytes / 16;
    /// 16 lanes for each group; warps are whole, so the last team may be another one of the last group.
    static constexpr int teams = (L::groups + 1) / 2 * 2;
    U32x4 bytes[words];
    alignas(16) float row[D];
    float product[L::is_parts ? D : 1], buffer[L::is_parts ? 1 : teams * D], levels[Levels<L>::count];
    u8 codes[teams * GroupEncoder<L>::count];

    static constexpr bool suffices(int threads) { return D <= threads && words <= threads && teams * row_lanes <= threads; }
};

/// Where the new row goes in the ring, and which row of it becomes packed row `index`, if one leaves. Places are counted on beyond the ring's end.
struct AppendPlaces {
    int entering, leaving, index;
    bool leaves;
};

/// `places`: those of this step, which follow from lengths.
template <class T, class L, int threads, class Places>
__device__ __forceinline__ void append_to(const AppendParams& p, const AppendStream& stream, int head, int batch, AppendSpace<L>& space, const Places& places) {
    using Space = AppendSpace<L>;
    using Group = GroupEncoder<L>;
    constexpr int D = L::head_dim, words = Space::words, teams = Space::teams;
    static_assert(Space::suffices(threads), "one element, word or team for each thread");
    const int thread = threadIdx.x, channel = thread < D ? thread : D - 1;
    const i64 sequence_head = static_cast<i64>(batch) * p.kv_heads + head;
    // What needs no length first.
    const TransformParams& transform = stream.codec.transform;
    BlockProduct<D, threads> matrix;
    if constexpr (L::is_parts) matrix.start(reinterpret_cast<const float*>(transform.matrix) + static_cast<i64>(head) * D * D);
    const float level = Levels<L>::load(stream.codec);
    const int origin = p.origins ? reinterpret_cast<const i32*>(p.origins)[batch] : 0;
    const AppendPlaces place = places();
    const int index = place.index;
    T* ring = reinterpret_cast<T*>(stream.ring) + sequence_head * p.ring_rows * D + channel;
    auto in_ring = [&](int row) { return ring + (row < p.ring_rows ? row : row - p.ring_rows) * D; };
    T* entering = in_ring(place.entering);
    const T arriving = (reinterpret_cast<const T*>(stream.row) + batch * stream.batch_stride + head * stream.head_stride)[channel];
    if (!place.leaves) {
        if (thread < D) *entering = arriving;
        return;
    }
    const int block = L::is_parts ? 0 : block_of_page(transform, index / page_rows);
    const HeadTransform of_head(transform, D, batch, head, p.kv_heads, block);
    u8* page = reinterpret_cast<u8*>(reinterpret_cast<const u64*>(stream.pages)[sequence_head * p.page_capacity + index / page_rows]);
    U32x4* page_block = reinterpret_cast<U32x4*>(page + index / block_rows % blocks_per_page * L::block_bytes);
    const float x = widen(*in_ring(place.leaving));
    // The block's bytes are the last to come: by warps that do not encode, and kept until there is nothing else to do.
    const int word = threads - 1 - thread;
    U32x4 before{};
    if (word < words) before = page_block[word];
    if constexpr (L::is_parts) matrix.go_on();
    const Centering centering(transform, of_head, D, origin + index, channel);
    Levels<L>::store(space.levels, level);
    if (thread < D) space.row[channel] = centering.of(x);
    bool finite = is_finite(x);
    __syncthreads();
    if (thread < D) *entering = arriving;  // the ring's row has been read by all: its place may be this one
    if constexpr (L::is_parts) {
        matrix.multiply(space.row, space.product);
        __syncthreads();
    }
    const int team = thread / row_lanes, lane = thread % row_lanes, group = team < L::groups ? team : L::groups - 1;
    float scale = 0.0f, zero = 0.0f;
    if (__any_sync(whole_warp, team < teams)) {  // a vote, so that the compiler sees whole warps
        float elements[D / 16], own[Group::per_lane];
#pragma unroll
        for (int k = 0; k < D / 16; ++k) elements[k] = (L::is_parts ? space.product : space.row)[lane + 16 * k];
        float* own_buffer = space.buffer + (L::is_parts ? 0 : team * D);
        if constexpr (!L::is_parts) turn_forward<D>(elements, transform, of_head, own_buffer, lane);
        for_each<L::groups>([&](auto which) {
            constexpr int g = decltype(which)::value;
#pragma unroll
            for (int k = 0; k < Group::per_lane; ++k) own[k] = g == 0 || group == g ? elements[g * Group::per_lane + k] : own[k];
        });
        Group encoder(stream.codec, space.levels, space.codes + team * Group::count, own_buffer, lane, own);
        encoder.run();
        finite = finite && encoder.finite();
        scale = encoder.scale, zero = encoder.zero;
    }
    if (word < words) space.bytes[word] = before;
    finite = __syncthreads_and(finite) != 0;
    if (lane == 0 && team < L::groups) {
        if (!finite && team == 0) atomicAdd(reinterpret_cast<i32*>(p.refused), 1);
        write_numbers<L>(page, index % page_rows, group, scale, zero, finite);
    }
    put_row<L, threads>(reinterpret_cast<u8*>(space.bytes), index % block_rows, space.codes, finite);
    __syncthreads();
    if (word < words) page_block[word] = space.bytes[word];
}

template <class T, class L>
__device__ __forceinline__ void append_row_to(const AppendParams& p, const AppendStream& stream) {
    __shared__ AppendSpace<L> space;
    append_to<T, L, append_threads>(p, stream, blockIdx.y, blockIdx.z, space, [&]() -> AppendPlaces {
        const i32* lengths = reinterpret_cast<const i32*>(p.lengths);
        const int window = lengths[2], first = lengths[3];
        // Rows that leave with a block that is complete are packed already.
        const bool leaves = p.leaves < 0 ? lengths[4] > 0 && lengths[5] < 0 : p.leaves != 0;
        return {first + window - 1, first + p.ring_rows - 1, lengths[0] - 1, leaves};
    });
}

template <class T, class K, class V>
__global__ void __launch_bounds__(append_threads) append_row(const __grid_constant__ AppendParams p) {
    if (blockIdx.x == keys) append_row_to<T, K>(p, p.keys);
    else append_row_to<T, V>(p, p.values);
}

}  // namespace skvq

// A call of up to eight queries of a kv head in one launch: for short pasts, whose launches take longer than their rows.
//
// Is: fold.cuh, attend.cuh, plain.cuh and the unfold of merge.cuh, by their own code; states in the model's space, one for each split; q·m(t) by
// turned.cuh; and, of few states, the merge of merge.cuh. Is not: q·m(t) of f32 or wide heads, which turning.cuh writes before it. Every block of
// packed rows folds the queries for itself, while its first pages are on their way, and undoes the transform of its own state: no launch waits for
// another in between, and nothing but states goes through memory. The block of a kv head that comes to its end last merges them.
// In a decode step the new token may enter with the launch that attends to it, as a fresh row: two blocks for each (kv head, sequence) more put its key
// and value into the ring, and pack the row that the next token will push out of the window behind the packed ones, where nobody looks yet. So that
// row is packed when it leaves, and all that a step does to the store is done beside its attention. The last block of all writes the new lengths.
// Grid: kv heads × batch × (splits of packed rows, then those of the regions of plain.cuh, which fill the last turn, then key and value of a token that
// enters); block: 4 warps.
//
//   packed rows:  pages ── ring ──┐
//                 q ── fold ── q' ┴─ attend ─▶ state of 4 warps ── unfold ─▶ states [plain states + split]
//   other rows:   q, sinks, window, fresh ── plain ───────────────────────▶ states [split of regions]
//   last block:   all states of a kv head ── merge ─▶ output
//   new token:    key, value ─▶ ring; first row of the window ── append ─▶ page
#pragma once
#include "append.cuh"
#include "attend.cuh"
#include "merge.cuh"
#include "plain.cuh"

namespace skvq {

/// Folds its own queries, unfolds its own state.
template <class T, class K, class V>
struct AloneInLaunch {
    static constexpr int floats = transform_floats<K> > transform_floats<V> ? transform_floats<K> : transform_floats<V>;
    static constexpr bool turns = turns_inside<T, K>;  // where the host says so
    static constexpr int turned_width = turns ? K::head_dim : 16;
    struct alignas(16) Shared {
        // Of the fold, before any page, and of what undoes the transform, behind them.
        union {
            float buffer[floats];
            TurnedPages<turned_width> pages;
        };
        u32 fragments[folded_words<K>];
        float extras[extras_floats<K>];
        TileWaves<turned_width> tile;
    };
    static constexpr int shared_bytes = sizeof(Shared);
    static constexpr bool one_tile = true;  // of queries of a kv head
    const OnceParams& once;
    Shared& own;

    __device__ __forceinline__ Lengths lengths(const AttendParams& p) const { return Lengths(p.lengths, p.enter); }

    template <bool Turned>
    __device__ __forceinline__ auto turned_rows(const AttendParams& p, int batch) const {
        if constexpr (Turned) return TurnedRows<K::head_dim>(p.turned, own.tile, own.pages, batch);
        else return NoPages();
    }

    template <bool Bytes, bool Turned>
    __device__ __forceinline__ void bring(FoldedQueries<K, 1, Bytes, Turned>& queries, const AttendParams& p, const SplitPlace& place, int statistics,
                                          int lane) const {
        wait_for_earlier_launches();
        const int head = block_x_here();  // of one tile each
        if constexpr (Turned) fold_waves<T>(once.fold, p.turned, place.batch, head, 0, own.tile);
        fold_tile<T, K>(once.fold, place.batch, head, 0, statistics, own.buffer, own.fragments, own.extras);
        __syncthreads();
        queries.load(p, 0, own.fragments, own.extras, FromShared(), lane);
    }

    template <bool Integers>
    __device__ __forceinline__ void write(RunningState<V, 1, Integers>& state, const AttendParams& p, const SplitPlace& place, float* shared) const {
        using Exchange = StateExchange<V, 1>;
        constexpr int D = V::head_dim, per_lane = D / 16;
        __syncthreads();
        exchange_states(state, p, shared);
        const int query = threadIdx.x / row_lanes, lane = threadIdx.x % row_lanes, head = block_x_here();
        const float* from = shared + query * Exchange::width;
        auto joined = [&](int at) {
            float sum = from[at];
#pragma unroll
            for (int other = 1; other < Exchange::at_once; ++other) sum += from[other * Exchange::warp_floats + at];
            return sum;
        };
        float row[per_lane];
#pragma unroll
        for (int k = 0; k < per_lane; ++k) row[k] = joined(state_head + lane + 16 * k);
        const float weight = joined(2);
        const TransformParams& values = once.values;
        const HeadTransform transform(values, D, place.batch, head, p.kv_heads, block_of_page(values, first_page_of(p, place.split)));
        // A block of statistics that holds no row yet has none: its states are empty.
        bool seen;
        if constexpr (V::is_parts) seen = !__syncthreads_and(weight == 0.0f);
        else seen = __any_sync(whole_warp, weight != 0.0f);
        if (seen) {
            if constexpr (V::is_parts) {
                multiply_rows<D, false, D < 128 ? 8 : 16>(row, transform.inverse, own.buffer, query, lane);
            } else {
                turn_back<D>(row, values, transform, own.buffer + query * D, lane);
            }
#pragma unroll
            for (int k = 0; k < per_lane; ++k) {
                if (transform.scale) row[k] *= transform.scale[lane + 16 * k];
                if (transform.shift) row[k] += weight * transform.shift[lane + 16 * k];
            }
        }
        if (!query_at(head, p.group, p.length, query).exists) return;
        float* to = state_at(once.plain.states, place.batch, place.head_tile, p.kv_heads * p.query_tiles, query, once.plain.state_count,
                             once.first_state + place.split, D);
        if (lane == 0) to[0] = from[0], to[1] = joined(1), to[2] = 0.0f, to[3] = 0.0f;
#pragma unroll
        for (int k = 0; k < per_lane; ++k) to[state_head + lane + 16 * k] = row[k];
    }
};

#if defined(__CUDA_ARCH__)
constexpr int compiled_for = __CUDA_ARCH__;
#else
constexpr int compiled_for = 0;
#endif
/// Whether a mean that turns takes more registers than a fourth block leaves, as the compiler has it for newer architectures.
template <class K>
constexpr bool turning_takes_more = compiled_for >= (K::is_even ? 1200 : 1000);
/// Rows in f32 take more, too.
template <class T, class K, class V>
constexpr int once_blocks =
    (sizeof(T) == 4 || (turns_inside<T, K> && turning_takes_more<K>)) && resident_blocks<K, V, 1> > 3 ? 3 : resident_blocks<K, V, 1>;

/// States of a slice on their way to a merge in this launch (`merges_at_once` of src/cuda/store/attend.rs).
template <class V>
constexpr int once_merged = 16 / merge_loads(V::head_dim);

/// Whether a token may enter with the launch (`enters_inside` of src/cuda/pages.rs).
template <class L>
constexpr bool enters_inside = AppendSpace<L>::suffices(attend_threads);

/// Key or value of a token that enters.
template <class T, class L>
__device__ __forceinline__ void enter_row(const OnceParams& p, const AppendStream& stream, u8* shared) {
    if constexpr (enters_inside<L>) {
        append_to<T, L, attend_threads>(p.append, stream, block_x_here(), blockIdx.y, *reinterpret_cast<AppendSpace<L>*>(shared), [&]() -> AppendPlaces {
            const Lengths before(p.plain.lengths), lengths(p.plain.lengths, p.plain.enter);
            // With the token the window is full, and its first row is the next to leave. Without room it may have no page, and stays.
            const bool leaves = before.stored() < p.plain.enter.most_tokens && lengths.window + 1 == p.plain.enter.window;
            return {lengths.first + lengths.window, lengths.first, lengths.packed, leaves};
        });
    }
}

/// The lengths with a token that has entered, once nobody reads those before it any more.
__device__ __forceinline__ void write_entered(const OnceParams& p) {
    i32* to = reinterpret_cast<i32*>(p.plain.lengths);
    const Lengths before(p.plain.lengths), lengths(p.plain.lengths, p.plain.enter);
    if (before.stored() >= p.plain.enter.most_tokens) *reinterpret_cast<i32*>(p.overflow) += 1;
    to[0] = lengths.packed, to[2] = lengths.window + 1, to[3] = lengths.first;
}

template <class T, class K, class V>
__global__ void __launch_bounds__(attend_threads, once_blocks<T, K, V>) attend_once(const __grid_constant__ OnceParams p) {
    static_assert(attend_threads == row_threads, "16 threads for each query of a tile");
    using Alone = AloneInLaunch<T, K, V>;
    constexpr int rows = attend_bytes<K, V, 1, Alone::shared_bytes>, plain = plain_bytes<T, K::head_dim, V::head_dim, 2>;
    constexpr int once_bytes = rows > plain ? rows : plain;
    alignas(16) __shared__ u8 shared[once_bytes];
    static_assert(!(enters_inside<K> && sizeof(AppendSpace<K>) > once_bytes) && !(enters_inside<V> && sizeof(AppendSpace<V>) > once_bytes), "where rows are");
    __shared__ typename Alone::Shared own;
    static_assert(sizeof(shared) + sizeof(own) + 16 <= 48 * 1024, "what a launch has without asking for more");
    let_next_launch_begin();
    const int which = static_cast<int>(blockIdx.z) - p.attend.splits;
    if (which < 0) {
        const Alone alone = {p, own};
        if constexpr (Alone::turns) {
            p.attend.turned.waves ? attend_levels<K, V, 1, false, true>(p.attend, shared, alone) : attend_levels<K, V, 1, false, false>(p.attend, shared, alone);
        } else {
            attend_levels<K, V, 1, false, false>(p.attend, shared, alone);
        }
    }
    else if (p.plain.enter.window && which >= static_cast<int>(gridDim.z) - p.attend.splits - 2) {
        wait_for_earlier_launches();
        if (blockIdx.z + 1 == gridDim.z) enter_row<T, V>(p, p.append.values, shared);
        else enter_row<T, K>(p, p.append.keys, shared);
    }
    else plain_split<T, K::head_dim, V::head_dim, 2>(p.plain, which, blockIdx.x, blockIdx.y, reinterpret_cast<U32x4*>(shared));
    wait_for_earlier_launches();  // splits without rows have not yet
    if (!p.arrivals) return;
    i32* arrivals = reinterpret_cast<i32*>(p.arrivals);
    const int heads = gridDim.x * gridDim.y;
    if (!comes_last(arrivals + blockIdx.y * gridDim.x + blockIdx.x, gridDim.z)) return;
    // Heads count themselves while the states are on their way.
    const bool enters = p.plain.enter.window && thread_here() == 0;
    const i32 before = enters ? atomicAdd(arrivals + heads, 1) : 0;
    if (p.merges) {
        int slices = merge_slices;
        while (slices > 1 && merge_slices / slices < p.merge.group * p.merge.length) slices /= 2;
        static_assert(sizeof(MergeSlices<V::head_dim>) <= sizeof(shared), "where rows were");
        merge_queries<T, V::head_dim, once_merged<V>>(p.merge, blockIdx.y, blockIdx.x, 0, slices, *reinterpret_cast<MergeSlices<V::head_dim>*>(shared));
    }
    if (enters && before == heads - 1) {
        arrivals[heads] = 0;
        __threadfence();  // behind the counts of all others, and so behind what they have read
        write_entered(p);
    }
}

}  // namespace skvq

// Row blocks on their way from pages through shared memory, for the loop over whole pages of attend.cuh.
//
// Is: copies in the background (cp.async, 16 bytes a lane) to slots of each warp's own, and a lane's codes and numbers out of them. Is not: waits and
// turns, which are the loop's. No warp needs another: where its lanes have met, what they have copied is there and what they have read is free.
#pragma once
#include "levels.cuh"
#include "numbers.cuh"
#include "running.cuh"

namespace skvq {

/// A slot has `at_once` neighbouring row blocks of a page: codes of keys, of values, numbers of keys, of values, each as in the page.
/// `Apart`: a warp takes all row blocks of its pages, not two of each. `Taken`: bytes of shared memory that others have.
template <class K, class V, bool Apart = false, int Taken = 0>
struct RowRing {
    static constexpr int pair_bytes = 2 * (K::block_bytes + V::block_bytes + 8 * (K::pair_bytes + V::pair_bytes));
    static constexpr int most_bytes = 48 * 1024 - Taken, most_at_once = most_bytes / 2 < 20480 ? most_bytes / 2 : 20480;
    /// A warp's two row blocks of a page together, or one after the other where they are large.
    static constexpr int at_once = attend_warps * pair_bytes > most_at_once ? 1 : 2, page_turns = (Apart ? blocks_per_page : 2) / at_once;
    static constexpr int slot_bytes = pair_bytes / 2 * at_once, turn_bytes = attend_warps * slot_bytes;
    static constexpr int most_slots = most_bytes / turn_bytes;
    /// Where not two slots fit there is no ring.
    static constexpr bool fits = most_slots >= 2;
    static constexpr int slots = most_slots > 4 ? 4 : most_slots, bytes = fits ? slots * turn_bytes : 0;
    static constexpr int key_codes = 0, value_codes = at_once * K::block_bytes, key_numbers = value_codes + at_once * V::block_bytes;
    static constexpr int value_numbers = key_numbers + at_once * 8 * K::pair_bytes;

    static constexpr int chunk = 32 * 16, chunks = (slot_bytes + chunk - 1) / chunk;

    /// Bytes of one of the four, in a slot and in a page: where it begins, how far apart row blocks are.
    struct Segment {
        int begin, end, in_page, stride;
        bool of_values;
    };
    static constexpr Segment segment(int which) {
        if (which == 0) return {key_codes, value_codes, 0, K::block_bytes, false};
        if (which == 1) return {value_codes, key_numbers, 0, V::block_bytes, true};
        if (which == 2) return {key_numbers, value_numbers, K::page_code_bytes, 8 * K::pair_bytes, false};
        return {value_numbers, slot_bytes, V::page_code_bytes, 8 * V::pair_bytes, true};
    }
    /// The segment that a whole chunk lies in, or −1.
    static constexpr int segment_of(int index) {
        for (int which = 0; which < 4; ++which) {
            if (chunk * index >= segment(which).begin && chunk * (index + 1) <= segment(which).end) return which;
        }
        return -1;
    }

    SharedPlace own;  // slots of this warp
    u32 lane;
    u32 warp_bytes[2];               // of keys and values: where this lane's copies of codes begin in a page
    u32 mixed[chunks], steps[chunks];  // of chunks that lie in more than one segment: place in the page, and of the next row block
    bool of_values[chunks];

    __device__ __forceinline__ RowRing(u8* shared, int warp, int lane) : own(shared_place(shared) + warp * slots * slot_bytes), lane(lane) {
        const int first = first_block(warp, 0);
        warp_bytes[0] = first * K::block_bytes + 16 * lane;
        warp_bytes[1] = first * V::block_bytes + 16 * lane;
        for_each<chunks>([&](auto index) {
            constexpr int c = decltype(index)::value;
            if constexpr (segment_of(c) != 0 && segment_of(c) != 1) {
                const int at = chunk * c + 16 * lane;
                for_each<4>([&](auto which) {
                    constexpr Segment own_segment = segment(decltype(which)::value);
                    if (at < own_segment.begin) return;
                    mixed[c] = own_segment.in_page + first * own_segment.stride + at - own_segment.begin;
                    steps[c] = at_once * own_segment.stride;
                    of_values[c] = own_segment.of_values;
                });
            }
        });
    }

    /// The first row block of a warp's turn `inner` over a page.
    static __device__ __forceinline__ int first_block(int warp, int inner) { return (Apart ? 0 : 2 * warp) + inner * at_once; }

    /// Starts the copy of the row blocks of turn `inner` of a page to the slot at `slot_at`.
    __device__ __forceinline__ void fetch(int slot_at, u64 key_page, u64 value_page, int inner) const {
        const SharedPlace to = own + slot_at + 16 * lane;
        for_each<chunks>([&](auto index) {
            constexpr int c = decltype(index)::value, which = segment_of(c);
            if constexpr (which == 0 || which == 1) {
                const u64 from = (which == 0 ? key_page : value_page) + warp_bytes[which] + (page_turns > 1 ? inner * at_once * segment(which).stride : 0);
                copy_to_shared<chunk * c, chunk * c - segment(which).begin>(to, from);
            } else if (chunk * (c + 1) <= slot_bytes || 16 * lane < slot_bytes - chunk * c) {
                copy_to_shared<chunk * c, 0>(to, (of_values[c] ? value_page : key_page) + mixed[c] + (page_turns > 1 ? inner * steps[c] : 0));
            }
        });
    }
    template <int Block>
    __device__ __forceinline__ void read_keys(int slot_at, LaneCodes<K>& codes, PairNumbers<K>& numbers) const {
        codes.read(SlotBlock<key_codes + Block * K::block_bytes>{own + slot_at, lane});
        numbers.read(SlotPair<key_numbers + Block * 8 * K::pair_bytes>{own + slot_at + lane / 4 * K::pair_bytes});
    }
    template <int Block>
    __device__ __forceinline__ void read_values(int slot_at, LaneCodes<V>& codes, PairNumbers<V>& numbers) const {
        codes.read(SlotBlock<value_codes + Block * V::block_bytes>{own + slot_at, lane});
        numbers.read(SlotPair<value_numbers + Block * 8 * V::pair_bytes>{own + slot_at + lane / 4 * V::pair_bytes});
    }

   private:
    /// Bytes of a slot from `First` on, as LaneCodes and PairNumbers read them.
    template <int First>
    struct SlotBlock {
        SharedPlace slot;
        u32 lane;
        template <class T, int Run>
        __device__ __forceinline__ T word() const {
            return load_shared<First + Run, T>(slot + static_cast<u32>(sizeof(T)) * lane);
        }
    };
    template <int First>
    struct SlotPair {
        SharedPlace pair;
        template <class T, int At>
        __device__ __forceinline__ T word() const {
            return load_shared<First + At, T>(pair);
        }
    };
};

}  // namespace skvq

// Kernels for the tests alone: what layout.cuh and levels.cuh make of a format.
#pragma once
#include "../levels.cuh"
#include "../numbers.cuh"

namespace skvq {

struct SizesParams {
    u64 sizes;  // i32 [5]
};
/// Bytes of a page, of a lane in a row block, of a pair of rows' numbers, of a FORMAT.md row's codes and numbers.
template <class L>
__global__ void __launch_bounds__(32) sizes_of_layout(const __grid_constant__ SizesParams p) {
    const int sizes[5] = {L::page_bytes, L::lane_bytes, L::pair_bytes, L::row_code_bytes(), L::row_number_bytes};
    if (threadIdx.x < 5) reinterpret_cast<i32*>(p.sizes)[threadIdx.x] = sizes[threadIdx.x];
}

/// The f16 levels of packed rows as attention's fragments see them, scattered to [rows, L::channels]: for the tests of levels.cuh.
struct FragmentParams {
    u64 pages, levels;  // levels: u16 [rows, channels]
    u64 wide_levels;
    LevelTable table;
};
template <class L>
__global__ void __launch_bounds__(32) fragments_to_rows(const __grid_constant__ FragmentParams p) {
    const int block = blockIdx.x, lane = threadIdx.x;
    const u8* page = reinterpret_cast<const u8*>(reinterpret_cast<const u64*>(p.pages)[block / blocks_per_page]);
    LaneCodes<L> codes;
    codes.load(page, block % blocks_per_page, lane);
    LaneDecoder<L> decoder(codes, p.table, p.wide_levels);
    u16* to = reinterpret_cast<u16*>(p.levels);
    for_each<L::channels / 8>([&](auto index) {
        u32 registers[2];
        decoder.template octet<decltype(index)::value>(registers[0], registers[1]);
        for (int i = 0; i < 4; ++i) {
            int row, channel;
            row_and_code<L>({lane, decltype(index)::value, i}, row, channel);
            to[(block * block_rows + row) * static_cast<i64>(L::channels) + channel] = static_cast<u16>(registers[i / 2] >> 16 * (i % 2));
        }
    });
}

/// All E4M3 numbers, two by two, as attention widens them: f32 [256].
struct WidenedParams {
    u64 numbers;
};
template <int Threads>
__global__ void __launch_bounds__(Threads) widened_e4m3(const __grid_constant__ WidenedParams p) {
    float* to = reinterpret_cast<float*>(p.numbers);
    for (u32 byte = threadIdx.x; byte < 256; byte += Threads) {
        float low, high;
        widen_halves(halves_of_e4m3(byte | (255 - byte) << 8 | 0xabcd0000u), low, high);
        to[byte] = low;
        // The other half of each pair has been or will be written as a lower half: they must agree.
        if (float_of_e4m3(255 - byte) != high && !is_nan(high)) to[byte] = not_a_number();
    }
}

}  // namespace skvq

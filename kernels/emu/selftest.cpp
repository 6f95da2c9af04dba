// A cache's life without Python, for runs under AddressSanitizer and ThreadSanitizer: encode, append, attend, unfold, merge, decode.
//
// Is: every buffer of its exact size on the heap, ragged lengths, and the output compared with plain loops in double over the decoded rows.
// Is not: a test of the codec's bytes (tests/test_kernels_codec.py). Exit status 0: all agree.
#define _GNU_SOURCE 1
#include "append.cuh"
#include "append_block.cuh"
#include "attend_many.cuh"
#include "attend_once.cuh"
#include "attend_rows.cuh"
#include "decode.cuh"
#include "encode.cuh"
#include "merge.cuh"
#include "plain.cuh"
#include "reach.cuh"
#include "statistics.cuh"
#include "unpack.cuh"

#include <cstdio>
#include <limits>
#include <memory>
#include <random>
#include <tuple>

using namespace skvq;

namespace {
constexpr int D = 64, kv_heads = 2, group = 3, sinks = 3, window = 5, packed = 150, block = 128, pages = 2, splits = 2, singles = 23;
constexpr int head_tiles = kv_heads, state_count = 4, block_capacity = 2;
constexpr int few_threads = row_lanes * (group + group % 2);  // of fold and unfold without a matrix

std::mt19937 random_bits(1);

template <class T>
u64 address(const std::vector<T>& of) {
    return reinterpret_cast<u64>(of.data());
}
std::vector<float> normal(size_t count) {
    std::normal_distribution<float> distribution;
    std::vector<float> made(count);
    for (float& value : made) value = distribution(random_bits);
    return made;
}

/// A stream's packed rows: pages at multiples of 16 bytes, their table, statistics, levels.
template <class L>
struct Stream {
    std::vector<std::vector<U32x4>> memory;
    std::vector<u64> table;
    std::vector<float> rows = normal(static_cast<size_t>(kv_heads) * block_capacity * block * D), levels, shift, scale, read, map;
    i32 refused = 0;
    LevelTable words{};

    /// Levels as params.cuh and encode.cuh want them: those of parts one codebook after the other.
    Stream() : shift(kv_heads * block_capacity * D), scale(shift.size()), read(static_cast<size_t>(kv_heads) * packed * D) {
        const int widest = L::is_parts ? 5 : L::part_bits(0), narrowest = L::is_parts ? 1 : widest;
        for (int bits = narrowest; bits <= widest; ++bits) {
            const int count = L::is_ternary ? 3 : 1 << bits, word = bits == 1 ? 0 : 1 << (bits - 2);
            for (int i = 0; i < count; ++i) {
                const float number = (i - (count - 1) * 0.5f) * (!L::is_even ? 3.0f / count : L::is_parts ? even_step_of(bits) : 1.0f);
                const u16 level = half_of_float(number);
                levels.push_back(L::is_even ? number : float_of_half(level));
                words.low[word + i / 4] |= (level & 255u) << 8 * (i % 4);
                words.high[word + i / 4] |= (level >> 8u) << 8 * (i % 4);
            }
        }
        words.step = L::is_even && L::stream == keys, words.correction = 1.0f;
        for (int i = 0; i < kv_heads * pages; ++i) {
            memory.emplace_back(L::page_bytes / 16);
            table.push_back(address(memory.back()));
        }
        // y_j = x_{j + 1}: M by columns, and its inverse by rows.
        for (int i = 0; i < kv_heads * D * D; ++i) map.push_back(i / D % D == (i + 1) % D ? 1.0f : 0.0f);
    }

    TransformParams transform() const {
        TransformParams p{};
        p.shift = address(shift);
        if (L::is_parts) p.matrix = p.inverse = address(map);
        else p.scale = address(scale), p.rotation = 1;
        // Values of parts have no blocks of statistics: one matrix, and one shift, for all states.
        if (!L::is_parts || L::stream == keys) p.pages_per_block = block / page_rows, p.block_count = block_capacity;
        return p;
    }

    CodecParams codec() const {
        CodecParams p{};
        p.levels = address(levels), p.transform = transform();
        p.clip = 1.0f, p.refinements = L::is_parts ? 0 : 1;
        return p;
    }

    StatisticsParams statistics() const {
        StatisticsParams s{};
        s.rows = address(rows), s.head_stride = block_capacity * block * D, s.row_stride = D;
        s.shift = address(shift), s.scale = address(scale);
        s.exponent = s.exponent_alone = 0.5, s.block = block, s.block_capacity = block_capacity, s.kv_heads = kv_heads, s.with_shift = 1;
        return s;
    }
    EncodeParams encoding() {
        EncodeParams e{};
        e.rows = address(rows), e.head_stride = block_capacity * block * D, e.row_stride = D;
        e.pages = address(table), e.refused = reinterpret_cast<u64>(&refused), e.codec = codec(), e.page_capacity = pages, e.kv_heads = kv_heads;
        return e;
    }
    void pack_rows(int first, int count) {
        EncodeParams e = encoding();
        e.first_row = first, e.row_count = count;
        e.rows += 4ull * first * D;
        const unsigned blocks = (first + count - 1) / block_rows - first / block_rows + 1;
        emulator::launch({blocks, kv_heads, 1}, {encode_threads, 1, 1}, 0, [&] { encode<float, L>(e); });
    }
    /// All but the last rows.
    void pack(u64 factors = 0) {
        StatisticsParams s = statistics();
        s.factors = factors;
        emulator::launch({block_capacity, kv_heads, 1}, {statistics_threads, 1, 1}, 0, [&] { block_statistics<float, D>(s); });
        pack_rows(0, 37);
        pack_rows(37, packed - singles - 37);
    }
    /// Of the second block nothing is left.
    void forget_block() {
        for (int head = 0; head < kv_heads; ++head) {
            std::fill(memory[head * pages + 1].begin(), memory[head * pages + 1].end(), U32x4{~0u, ~0u, ~0u, ~0u});
            for (auto* numbers : {&shift, &scale}) std::fill_n(numbers->begin() + (head * block_capacity + 1) * D, D, -1.0f);
        }
    }
    /// The rows are their own ring, in which a new one is where it came from.
    AppendStream single(int row) const {
        AppendStream s{};
        s.row = address(rows) + 4ull * (row + window) * D, s.head_stride = block_capacity * block * D;
        s.ring = address(rows), s.pages = address(table), s.codec = codec();
        return s;
    }
    void decode_all() {
        DecodeParams d{};
        d.pages = address(table), d.rows = address(read), d.head_stride = packed * D, d.row_stride = D, d.levels = address(levels);
        d.transform = transform(), d.row_count = packed, d.page_capacity = pages, d.kv_heads = kv_heads;
        emulator::launch({(packed + 15) / 16, kv_heads, 1}, {decode_threads, 1, 1}, 0, [&] { decode<float, L>(d); });
    }
};

/// softmax(q·k)·v of one query over the rows of one head.
void attend_exactly(const float* q, const std::vector<const float*>& key_rows, const std::vector<const float*>& value_rows, double* out) {
    double sum = 0.0, largest = -1e300;
    std::vector<double> scores;
    for (const float* key : key_rows) {
        double score = 0.0;
        for (int c = 0; c < D; ++c) score += static_cast<double>(q[c]) * key[c] * 0.125;
        scores.push_back(score);
        largest = std::max(largest, score);
    }
    std::fill(out, out + D, 0.0);
    for (size_t row = 0; row < scores.size(); ++row) {
        const double weight = std::exp(scores[row] - largest);
        sum += weight;
        for (int c = 0; c < D; ++c) out[c] += weight * value_rows[row][c];
    }
    for (int c = 0; c < D; ++c) out[c] /= sum;
}

/// A replayed step that completes the second block leaves the factors, statistics and rows of launches one by one.
template <class K, class V>
bool completes_block() {
    Stream<K> keys_stream;
    Stream<V> values_stream;
    std::vector<double> squares;
    std::vector<float> factors(kv_heads * D);
    for (int head = 0; head < kv_heads; ++head) {
        for (const float x : normal(D)) squares.push_back(x * x);
        squares.push_back(least_query_tokens);
    }
    FactorParams f{};
    f.squares = address(squares), f.factors = address(factors), f.exponent = 0.5, f.kv_heads = kv_heads, f.fixes = 1;
    emulator::launch({1, kv_heads, 1}, {factor_threads, 1, 1}, 0, [&] { query_factors<D>(f); });
    keys_stream.pack(f.factors), values_stream.pack();
    keys_stream.pack_rows(packed - singles, singles), values_stream.pack_rows(packed - singles, singles);
    keys_stream.decode_all(), values_stream.decode_all();
    const auto expected = std::make_tuple(factors, keys_stream.shift, keys_stream.scale, keys_stream.read, values_stream.scale, values_stream.read);

    std::fill(factors.begin(), factors.end(), 0.0f);
    keys_stream.forget_block(), values_stream.forget_block();
    // Rows are their own ring; the last one comes from elsewhere.
    const std::vector<i32> lengths{packed, sinks, 2 * block - packed, packed, packed - block, 1};
    AppendBlockParams p{};
    p.keys = {keys_stream.encoding(), keys_stream.statistics()}, p.values = {values_stream.encoding(), values_stream.statistics()};
    p.factors = f, p.keys.statistics.factors = f.factors, p.lengths = address(lengths), p.ring_rows = block_capacity * block;
    std::vector<float> arriving[2] = {std::vector<float>(kv_heads * D), std::vector<float>(kv_heads * D)};
    auto arrive = [&](auto& stream, std::vector<float>& row, StatisticsParams& s) {
        for (int head = 0; head < kv_heads; ++head) {
            float* last = &stream.rows[((head + 1) * block_capacity * block - 1) * D];
            std::copy_n(last, D, &row[head * D]);
            std::fill_n(last, D, 1e9f);
        }
        s.rows = address(row), s.head_stride = D;
    };
    arrive(keys_stream, arriving[0], p.keys.statistics), arrive(values_stream, arriving[1], p.values.statistics);
    emulator::launch({2, kv_heads, 1}, {append_block_threads, 1, 1}, 0, [&] { append_block<float, K, V>(p); });
    keys_stream.decode_all(), values_stream.decode_all();
    return expected == std::make_tuple(factors, keys_stream.shift, keys_stream.scale, keys_stream.read, values_stream.scale, values_stream.read);
}

std::vector<Half> halves(const std::vector<float>& numbers) {
    std::vector<Half> made;
    for (const float number : numbers) made.push_back({half_of_float(number)});
    return made;
}

/// Attention in f16 with the past unpacked in pieces of a page, all tokens shown by a mask: output rows.
template <class K, class V>
std::vector<float> attend_in_pieces(const Stream<K>& keys_stream, const Stream<V>& values_stream, const std::vector<float>& query,
                                    const std::vector<float>& key_rows, const std::vector<float>& value_rows) {
    using Shape = RowsShape<D, D>;
    constexpr int total = packed + sinks + window;
    const auto queries = halves(query), own_keys = halves(key_rows), own_values = halves(value_rows);
    const std::vector<i32> lengths{packed, sinks, window, 0};
    const std::vector<u8> mask(total, 1);
    std::vector<i32> reach(4);
    std::vector<float> states(kv_heads * query_tile * (state_head + D));
    std::vector<Half> piece_keys(kv_heads * page_rows * D), piece_values(piece_keys.size()), output(kv_heads * group * D);

    ReachParams seen{};
    seen.mask.mask = address(mask), seen.mask.kind = 4, seen.reach = address(reach), seen.heads = seen.positions = 1, seen.tokens = total;
    emulator::launch({1, 1, 1}, {row_threads, 1, 1}, 0, [&] { mask_reach<i32>(seen); });

    RowsParams r{};
    r.query = address(queries), r.query_head_stride = r.query_position_stride = D, r.states = address(states), r.lengths = address(lengths);
    r.reach = seen.reach, r.mask = seen.mask, r.scale = 0.125f, r.state_count = 1, r.kv_heads = kv_heads, r.group = group, r.length = 1, r.query_tiles = 1;
    r.past_room = page_rows;
    auto region = [&](int kind, const std::vector<Half>& of_keys, const std::vector<Half>& of_values, int first, int rows, int room) {
        RowsRegion made{};
        made.tiles = (rows + Shape::rows - 1) / Shape::rows;
        PlainRegion& own = made.rows;
        own.kind = kind, own.key_rows = address(of_keys) + 2 * first * D, own.value_rows = address(of_values) + 2 * first * D;
        own.key_head_stride = own.value_head_stride = room * D, own.key_row_stride = own.value_row_stride = D;
        return made;
    };
    auto attend_to = [&] { emulator::launch({1, kv_heads, 1}, {rows_block_threads, 1, 1}, Shape::bytes, [&] { attend_rows<Half, D, D>(r); }); };
    r.regions[0] = region(region_sinks, own_keys, own_values, 0, sinks, sinks + window);
    r.regions[1] = region(region_window, own_keys, own_values, sinks, window, sinks + window);
    r.tiles_per_split = 2;
    attend_to();
    r.regions[1] = {}, r.carries = 1;
    for (int first = 0; first < packed; first += page_rows) {
        const int count = std::min(page_rows, packed - first);
        auto unpack_to = [&](auto& stream, std::vector<Half>& rows, auto kernel) {
            UnpackParams u{};
            u.pages = address(stream.table), u.rows = address(rows), u.head_stride = page_rows * D, u.row_stride = D, u.transform = stream.transform();
            u.levels = stream.words, u.first_row = first, u.row_count = count, u.page_capacity = pages, u.kv_heads = kv_heads, u.pages_per_block = 1;
            emulator::launch({1, kv_heads, 1}, {unpack_threads, 1, 1}, unpack_bytes(D), [&] { kernel(u); });
        };
        unpack_to(keys_stream, piece_keys, unpack<Half, K>), unpack_to(values_stream, piece_values, unpack<Half, V>);
        r.regions[0] = region(region_past, piece_keys, piece_values, 0, count, page_rows);
        r.first_past = first, r.past_rows = count;
        attend_to();
    }
    MergeParams m{};
    m.states = r.states, m.output = address(output), m.output_head_stride = m.output_position_stride = D, m.state_count = 1;
    m.kv_heads = kv_heads, m.group = group, m.length = 1, m.query_tiles = 1;
    emulator::launch({kv_heads * group, 1, 1}, {merge_threads, 1, 1}, 0, [&] { merge<Half, D>(m); });
    std::vector<float> found;
    for (const Half number : output) found.push_back(float_of_half(number.bits));
    return found;
}

template <class K, class V>
double run() {
    Stream<K> keys_stream;
    Stream<V> values_stream;
    keys_stream.pack();
    values_stream.pack();
    for (int row = packed - singles; row < packed; ++row) {
        const std::vector<i32> now{row + 1, sinks, window, row + 1};
        AppendParams p{};
        p.keys = keys_stream.single(row), p.values = values_stream.single(row);
        p.refused = reinterpret_cast<u64>(&keys_stream.refused), p.lengths = address(now), p.leaves = 1;
        p.ring_rows = block_capacity * block, p.page_capacity = pages, p.kv_heads = kv_heads;
        emulator::launch({2, kv_heads, 1}, {append_threads, 1, 1}, 0, [&] { append_row<float, K, V>(p); });
    }
    keys_stream.decode_all();
    values_stream.decode_all();
    const auto query = normal(kv_heads * group * D);
    const auto key_rows = normal(kv_heads * (sinks + window) * D), value_rows = normal(key_rows.size());
    const std::vector<i32> lengths{packed, sinks, window, 0};
    std::vector<u32> folded(kv_heads * block_capacity * folded_words<K>);
    std::vector<float> extras(kv_heads * block_capacity * query_tile * (extras_head + K::groups));
    std::vector<float> packed_states(head_tiles * query_tile * splits * (state_head + D)), states(head_tiles * query_tile * state_count * (state_head + D));
    std::vector<float> output(kv_heads * group * D);

    FoldParams f{};
    f.query = address(query), f.query_head_stride = D, f.query_position_stride = D;
    f.folded = address(folded), f.extras = address(extras), f.lengths = address(lengths), f.transform = keys_stream.transform();
    f.scale = 0.125f, f.kv_heads = kv_heads, f.group = group, f.length = 1, f.query_tiles = 1, f.as_bytes = K::is_even;
    emulator::launch({block_capacity, kv_heads, 1}, {K::is_parts ? row_threads : few_threads, 1, 1}, 0, [&] { fold<float, K>(f); });

    AttendParams a{};
    a.key_pages = address(keys_stream.table), a.value_pages = address(values_stream.table), a.folded = f.folded, a.extras = f.extras;
    a.states = address(packed_states), a.lengths = address(lengths), a.key_levels = keys_stream.words, a.value_levels = values_stream.words;
    a.weight_unit = 1.0f, a.page_capacity = pages, a.pages_per_split = 1, a.splits = splits, a.long_splits = splits, a.short_pages = 1, a.pages_per_key_block = 1, a.key_blocks = block_capacity;
    a.kv_heads = kv_heads, a.group = group, a.length = 1, a.query_tiles = 1;
    emulator::launch({kv_heads, 1, splits}, {attend_threads, 1, 1}, 0, [&] { attend<K, V, 1>(a); });

    // The kernel of many queries must leave the same states; a warp of it has two tiles, here the same one twice.
    std::vector<u32> twice;
    std::vector<float> extras_twice, many_states(2 * packed_states.size());
    const size_t tile_words = folded_words<K>, tile_extras = query_tile * (extras_head + K::groups);
    for (size_t tile = 0; tile < folded.size() / tile_words; ++tile) {
        for (int copy = 0; copy < 2; ++copy) {
            twice.insert(twice.end(), folded.begin() + tile * tile_words, folded.begin() + (tile + 1) * tile_words);
            extras_twice.insert(extras_twice.end(), extras.begin() + tile * tile_extras, extras.begin() + (tile + 1) * tile_extras);
        }
    }
    AttendParams many = a;
    many.folded = address(twice), many.extras = address(extras_twice), many.states = address(many_states), many.query_tiles = 2;
    const size_t shared_bytes = many_buffers<K, V> * many_buffer_bytes<K, V>;
    // It takes no bytes.
    if (K::is_even) many_states.clear();
    else emulator::launch({splits, kv_heads, 1}, {many_threads, 1, 1}, shared_bytes, [&] { attend_many<K, V>(many); });
    const int width = state_head + D;
    for (int row = 0; !many_states.empty() && row < kv_heads * 2 * query_tile * splits; ++row) {
        const int tile = row / splits / query_tile / 2, other = (tile * query_tile + row / splits % query_tile) * splits + row % splits;
        const float *one = &packed_states[other * width], *two = &many_states[row * width];
        if (row / splits % (2 * query_tile) >= group) continue;  // the others do not exist
        for (int i = 0; i < D; ++i) {
            const double difference = one[1] > 0.0f || two[1] > 0.0f ? one[state_head + i] / one[1] - two[state_head + i] / two[1] : 0.0;
            if (!(std::fabs(difference) < 2e-3)) return 1.0;
        }
    }

    UnfoldParams u{};
    u.packed = a.states, u.states = address(states), u.transform = values_stream.transform();
    u.splits = splits, u.splits_per_state = 2, u.first_state = 3, u.state_count = state_count, u.pages_per_split = 1, u.kv_heads = kv_heads, u.query_tiles = 1, u.queries = group;
    emulator::launch({1, head_tiles, 1}, {V::is_parts ? row_threads : few_threads, 1, 1}, 0, [&] { unfold<D>(u); });

    PlainParams p{};
    p.query = f.query, p.query_head_stride = D, p.query_position_stride = D, p.states = u.states, p.lengths = a.lengths, p.scale = f.scale;
    p.state_count = state_count, p.kv_heads = kv_heads, p.group = group, p.length = 1, p.query_tiles = 1;
    for (int kind : {region_sinks, region_window}) {
        PlainRegion& region = p.regions[kind];
        region.kind = kind, region.splits = kind ? 2 : 1, region.rows_per_split = 3;
        region.key_rows = address(key_rows) + (kind ? 4 * sinks * D : 0), region.value_rows = address(value_rows) + (kind ? 4 * sinks * D : 0);
        region.key_head_stride = region.value_head_stride = (sinks + window) * D, region.key_row_stride = region.value_row_stride = D;
    }
    emulator::launch({3, head_tiles, 1}, {row_threads, 1, 1}, 0, [&] { plain<float, D, D>(p); });

    MergeParams m{};
    m.states = u.states, m.output = address(output), m.output_head_stride = D, m.output_position_stride = D, m.state_count = state_count;
    m.kv_heads = kv_heads, m.group = group, m.length = 1, m.query_tiles = 1;
    emulator::launch({kv_heads * group, 1, 1}, {merge_threads, 1, 1}, 0, [&] { merge<float, D>(m); });

    // One launch in place of all of these; a state for each split. The last block of a kv head merges.
    constexpr int once_count = 3 + splits;
    std::vector<float> once_states(head_tiles * query_tile * once_count * (state_head + D)), once_output(output.size());
    OnceParams once{};
    once.fold = f, once.attend = a, once.plain = p, once.values = u.transform, once.first_state = 3;
    once.fold.folded = once.fold.extras = once.attend.folded = once.attend.extras = once.attend.states = 0;
    once.plain.states = address(once_states), once.plain.state_count = once_count;
    m.states = address(once_states), m.output = address(once_output), m.state_count = once_count;
    std::vector<i32> arrivals(kv_heads + 1);
    once.merge = m, once.merges = 1, once.arrivals = address(arrivals);
    emulator::launch({kv_heads, 1, once_count}, {attend_threads, 1, 1}, 0, [&] { attend_once<float, K, V>(once); });

    // The same with the window's last row as a token that enters with the launch, which then packs the first one.
    constexpr int entering_count = once_count + 1;
    const float nothing = std::numeric_limits<float>::quiet_NaN();
    std::vector<float> entering_states(head_tiles * query_tile * entering_count * (state_head + D)), entering_output(output.size());
    std::vector<i32> before{packed, sinks, window - 1, 0};
    const std::vector<i32> after{packed, sinks, window, 0};
    once.attend.enter = once.plain.enter = {window, window, packed + sinks + window, 0};
    once.attend.lengths = once.plain.lengths = once.append.lengths = address(before), once.attend.mask.total_from_lengths_plus = once.plain.mask.total_from_lengths_plus = 1;
    once.plain.states = once.merge.states = address(entering_states), once.merge.output = address(entering_output);
    once.plain.state_count = once.merge.state_count = entering_count, once.first_state = 4, once.plain.fresh_rows = 1;
    const auto enter = [&](AppendStream& stream, std::vector<float>& ring, const std::vector<float>& rows, u64 PlainRegion::*place) {
        for (int head = 0; head < kv_heads; ++head) {
            const float* from = &rows[(head * (sinks + window) + sinks) * D];
            std::copy_n(from, (window - 1) * D, &ring[head * window * D]);
            std::fill_n(&ring[(head * window + window - 1) * D], D, nothing);
        }
        stream.row = address(rows) + 4 * (sinks + window - 1) * D, stream.head_stride = (sinks + window) * D, stream.ring = address(ring);
        once.plain.regions[region_window].*place = stream.ring, once.plain.regions[region_fresh].*place = stream.row;
    };
    once.append.keys = keys_stream.single(0), once.append.values = values_stream.single(0);
    std::vector<float> rings[2] = {std::vector<float>(kv_heads * window * D), std::vector<float>(kv_heads * window * D)};
    PlainRegion &own = once.plain.regions[region_window], &fresh = once.plain.regions[region_fresh];
    enter(once.append.keys, rings[0], key_rows, &PlainRegion::key_rows), enter(once.append.values, rings[1], value_rows, &PlainRegion::value_rows);
    own.key_head_stride = own.value_head_stride = window * D, own.ring_first = -1, own.ring_rows = window;
    fresh.kind = region_fresh, fresh.splits = 1, fresh.rows_per_split = 1, fresh.key_row_stride = fresh.value_row_stride = D;
    fresh.key_head_stride = fresh.value_head_stride = (sinks + window) * D;
    once.append.refused = reinterpret_cast<u64>(&keys_stream.refused), once.append.ring_rows = window;
    once.append.page_capacity = pages, once.append.kv_heads = kv_heads;
    emulator::launch({kv_heads, 1, entering_count + 2}, {attend_threads, 1, 1}, 0, [&] { attend_once<float, K, V>(once); });
    if (before != after || arrivals != std::vector<i32>(kv_heads + 1)) return 1.0;
    for (int head = 0; head < kv_heads; ++head) {
        const int last = (head * window + window - 1) * D, row = (head * (sinks + window) + sinks + window - 1) * D;
        if (!std::equal(&rings[0][last], &rings[0][last] + D, &key_rows[row])) return 1.0;
        if (!std::equal(&rings[1][last], &rings[1][last] + D, &value_rows[row])) return 1.0;
    }

    const auto in_pieces = attend_in_pieces(keys_stream, values_stream, query, key_rows, value_rows);
    double worst = 0.0;
    for (int head = 0; head < kv_heads * group; ++head) {
        const int kv_head = head / group;
        std::vector<const float*> k, v;
        for (int row = 0; row < packed; ++row) {
            k.push_back(&keys_stream.read[(kv_head * packed + row) * D]);
            v.push_back(&values_stream.read[(kv_head * packed + row) * D]);
        }
        for (int row = 0; row < sinks + window; ++row) {
            k.push_back(&key_rows[(kv_head * (sinks + window) + row) * D]);
            v.push_back(&value_rows[(kv_head * (sinks + window) + row) * D]);
        }
        double exact[D];
        attend_exactly(&query[head * D], k, v, exact);
        for (const auto* found : {&output, &once_output, &entering_output}) {
            for (int c = 0; c < D; ++c) worst = std::max(worst, std::fabs(exact[c] - (*found)[head * D + c]));
        }
        // Rows and queries in f16.
        for (int c = 0; c < D; ++c) worst = std::max(worst, 0.3 * std::fabs(exact[c] - in_pieces[head * D + c]));
    }
    return worst;
}
}  // namespace

int main() {
    using Keys2 = Layout<keys, D, 2, D, 1, 1>;
    using Ternary = Layout<values, D, format_ternary, 32, 1, 1>;
    using Parts = Layout<keys, D, format_parts, D, 1, 1, (5 | 1 << 3) | (3 | 1 << 3) << 8 | (1 | 2 << 3) << 16>;
    using EvenParts = Layout<keys, D, format_parts, D, 1, 1, (5 | 1 << 3) | (3 | 1 << 3) << 8 | (2 | 1 << 3) << 16 | (1 | 1 << 3) << 24, 1>;
    using EvenValues = Layout<values, D, 2, D, 1, 1, 0, 1>;
    using EvenValueParts = Layout<values, D, format_parts, D, 1, 1, (3 | 1 << 3) | (2 | 2 << 3) << 8 | (1 | 1 << 3) << 16, 1>;
    using ValueParts = Layout<values, D, format_parts, D, 1, 1, (4 | 1 << 3) | (2 | 3 << 3) << 8>;
    if (!completes_block<Keys2, Ternary>()) return 1;
#if defined(ONE_LAYOUT)  // formats differ in what a thread computes; how threads meet, in whether there is a matrix
    const double errors[1] = {run<Parts, ValueParts>()};
#else
    const double errors[4] = {run<Keys2, Ternary>(), run<Parts, Ternary>(), run<EvenParts, EvenValues>(), run<Keys2, EvenValueParts>()};
#endif
    for (double error : errors) {
        std::printf("largest error %.1e\n", error);
        if (!(error < 1e-3)) return 1;
    }
    return 0;
}

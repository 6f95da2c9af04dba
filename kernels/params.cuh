// What the host gives to each kernel: one plain struct a kernel, 8-byte fields first, so that Rust mirrors them with #[repr(C)].
//
// Is: pointers, shapes, strides. Is not: anything a template argument says already. Strides are in elements, pointers are device addresses.
// Lengths that a captured graph must not freeze lie in device memory: `lengths` points at {packed rows, sinks, window rows, where the window begins in
// its ring} (i32 each), rows of one (sequence, kv head) counted from the first token of each region. Behind them a store that replays steps has how
// many rows leave the window in the step, and which block of statistics is complete with it, or −1.
#pragma once
#include "portable.cuh"

namespace skvq {

/// The levels of a stream as f16, bytes apart, as byte permutations look them up: `low` has their low, `high` their high bytes, four to a word.
/// Of four levels that are evenly spaced around 0 `step` is the distance, of evenly spaced ones of parts 1, else 0 (bytes.cuh). Sums of f16 levels are to be multiplied by `correction`:
/// what rounding to f16 has done to all of three or four levels, it would do to every output.
/// The table of a codebook of 2^b levels begins at word {b = 1: 0, 2: 1, 3: 2, 4: 4, 5: 8}; three levels have the place of four; the second
/// coordinates of codewords of pairs follow the first ones, at word 4.
struct LevelTable {
    u32 low[16];
    u32 high[16];
    float step, correction;
};

/// repack.cuh. rows: code rows `[pages · 128, row_code_bytes]` and number rows `[pages · 128, row_number_bytes]`.
struct RepackParams {
    u64 code_rows, number_rows;
    u64 pages;  // [pages] addresses
    i32 rows;   // rows that exist
    i32 padding;
};

/// What a codec does to a row before it is quantized (FORMAT.md §3, §6). All f32 but the permutation (i32); 0 where there is none.
struct TransformParams {
    u64 shift;        // [heads, D], or statistics [batch, heads, blocks, D]
    u64 scale;        // [heads, D], or statistics [batch, heads, blocks, D]
    u64 permutation;  // [heads, D]
    u64 matrix;       // [heads, D, D]: M of parts, by columns
    u64 inverse;      // [heads, D, D]: B of parts
    u64 shift_sine;   // [heads, D]: ν of a mean that turns
    u64 spans;        // [span count, 2, D]: cosines, then sines of 256·i·θ, i from first_span on
    u64 steps;        // [256, 2, D]: of j·θ
    i32 rotation;     // 1: Hadamard
    i32 pages_per_block;  // pages that share statistics; 0: static ones
    i32 block_count;      // blocks that `shift` and `scale` have room for
    i32 first_span;
};

/// Of a mean that turns, for turned.cuh: `waves`, `channels` and `frequencies` as TurningParams has them, `origins` i32 [batch], the position of the first
/// packed row, `spans` and `steps` as TransformParams.
struct WaveParams {
    u64 waves, channels, spans, steps, origins;
    i32 first_span, frequencies;
};

/// fold.cuh. Queries of one kv head: query q is head kv_head · group + q / length at position q % length.
struct FoldParams {
    u64 query;  // [batch, heads, length, D]
    i64 query_batch_stride, query_head_stride, query_position_stride;
    u64 folded;  // f16 [batch, kv heads, blocks, query tiles, D / 16, 32 lanes, 2 registers of 2], as fragments; or bytes, see as_bytes
    u64 extras;  // f32 [batch, kv heads, blocks, query tiles, 8, 4 + groups]: unit, q·μ, noise, Σ of integers times their codes' middle (bytes), sums over groups
    u64 noise;   // f32 [D] or 0
    u64 lengths;   // where blocks of statistics may have no rows yet, and then no queries are folded for them; or 0
    TransformParams transform;
    float scale;  // softmax scale
    i32 kv_heads, group, length;
    i32 query_tiles;
    i32 as_bytes;  // integers of two bytes in place of f16: u32 [batch, kv heads, blocks, query tiles, D / 32 rounded up, 32 lanes, 4] (bytes.cuh);
                   // with keys of two bits not for ternary values of uneven levels
};

/// turned.cuh, fold_turned: of many queries, TileWaves [batch, kv heads, query tiles].
struct FoldTurnedParams {
    FoldParams fold;
    WaveParams waves;
    u64 factors;
};

/// turning.cuh: q·m(t) of every packed row. Grid: any number of blocks.
struct TurningParams {
    u64 query;
    i64 query_batch_stride, query_head_stride, query_position_stride;
    u64 bias;     // of each (batch, kv head, query tile): f32 [8] ranges, u16 [4 pairs of queries, capacity, 2]; of one query of a kv head u16 [8, capacity] (BiasPlace)
    u64 origins;  // i32 [batch]: position of the first packed row
    u64 lengths;
    TransformParams transform;
    // f16 [2, 16 row tiles, k-steps, 32 lanes, 4 registers of 2], as fragments of A, what f16 has of each number, then what it has of the rest: register
    // i of lane 4·g + t has cosine and sine of j·θ for step j = 16·tile + g + 8·(i % 2) and frequency 8·(k-step) + t + 4·⌊i / 2⌋; zeros behind the last one.
    u64 waves;
    u64 channels;  // i32 [frequencies + 1], where the channels of each of the distinct frequencies begin; then i32 [D], the channels in that order
    i64 capacity;
    float scale;
    i32 kv_heads, group, length, query_tiles;
    i32 batch, frequencies;
    i32 padding;
};

/// What hides a token, for attend.cuh and plain.cuh.
struct MaskParams {
    u64 mask;  // 0: none; f32, f16, bf16 (added) or u8 (0 hides), [batch | 1, heads | 1, length | 1, tokens]
    i64 batch_stride, head_stride, position_stride;
    u64 paddings;  // i32 [batch] or 0: tokens of padding before each sequence
    i32 kind;      // 0: none, 1: f32, 2: f16, 3: bf16, 4: u8
    i32 causal;    // query l sees tokens up to total − length + l
    float softcap; // 0: none
    i32 total_from_lengths_plus;  // total tokens = packed + sinks + window + this many fresh ones
};

/// A token that enters with the launch that attends to it (attend_once.cuh): lengths in memory are those before it.
struct EnterParams {
    i32 window;  // rows of a full one, at least 2; 0: no token enters
    i32 ring_rows;
    i32 most_tokens;  // that there is room for
    i32 padding;
};

/// attend.cuh. Grid: (kv heads · query tiles / tiles of the instance) × batch × splits; attend_many.cuh: splits × … × batch.
struct AttendParams {
    u64 key_pages, value_pages;  // u64 [batch, kv heads, page capacity]
    u64 folded, extras;          // of fold.cuh
    u64 bias;                    // of turning.cuh, or what fold_turned has written, or 0
    u64 states;                  // f32 [batch, kv heads, query tiles, 8, splits, 4 + Dv]: m, l, Σp, 0, o; of queries that exist
    u64 lengths;
    u64 reach;  // of reach.cuh, where there is a mask: of mask_reach in attend_many.cuh, else of mask_shows; or 0
    u64 key_wide_levels, value_wide_levels;  // f16 [256] of 8-bit codes, or 0: c − 127.5
    i64 bias_capacity;
    EnterParams enter;
    WaveParams turned;  // of a mean that turns in the same launch, by turned.cuh; otherwise without `waves`
    MaskParams mask;
    LevelTable key_levels, value_levels;
    float weight_unit;  // a power of two by which weights times scales are multiplied before they become f16
    i32 page_capacity, pages_per_split, splits;
    i32 long_splits, short_pages;  // so many splits have pages_per_split pages, those behind them short_pages; attend_many.cuh: all are long
    i32 pages_per_key_block, key_blocks;
    i32 kv_heads, group, length, query_tiles;
    i32 as_bytes;  // as of fold.cuh
    i32 padding;
};

/// Rows in the model's type that a call attends to, and how many blocks of threads take them.
struct PlainRegion {
    u64 key_rows, value_rows;
    u64 key_table, value_table;  // of the past: u64 [batch, kv heads, table_pages] in place of the rows, or 0
    i64 key_batch_stride, key_head_stride, key_row_stride;
    i64 value_batch_stride, value_head_stride, value_row_stride;
    i32 kind;  // 0: sinks, 1: window, 2: fresh rows, 3: the past
    i32 splits, rows_per_split;
    i32 ring_first, ring_rows;  // row r lies at (ring_first + r) mod ring_rows; ring_rows 0: at r; ring_first −1: the one behind the lengths
    i32 table_pages;
};

/// plain.cuh. Grid: splits of all regions, one region behind the other × (kv heads · query tiles) × batch.
struct PlainParams {
    u64 query;
    i64 query_batch_stride, query_head_stride, query_position_stride;
    u64 states;  // as of attend.cuh, of `state_count` states a query, of which block x makes number x
    u64 lengths;
    MaskParams mask;
    EnterParams enter;  // the token is the fresh row
    PlainRegion regions[4];  // behind the last one that has splits: anything
    float scale;
    i32 fresh_rows, state_count;
    i32 kv_heads, group, length, query_tiles;
    i32 padding;
};

/// reach.cuh. Grid: batch · heads · positions of the mask.
struct ReachParams {
    MaskParams mask;
    u64 reach;    // mask_reach: i32 [batch, heads, positions, 4]; mask_shows: u32 [batch, heads, positions]
    u64 lengths;  // of mask_shows
    i32 heads, positions;  // 1 where the mask is the same along them
    i32 tokens;
    // Of mask_shows: rows that are packed once the token of this call has entered, more than the lengths say; the least padding of all sequences.
    i32 entering, least_padding, padding;
};

/// Rows in the model's type that a block of many queries passes over; they lie in no pages.
struct RowsRegion {
    PlainRegion rows;  // but for its splits
    i32 tiles;  // of 64 rows, or 32 where heads are wide, that it may have
    i32 padding;
};

/// attend_rows.cuh. Grid: splits × (kv heads · blocks of queries) × batch.
struct RowsParams {
    u64 query;
    i64 query_batch_stride, query_head_stride, query_position_stride;
    u64 states;  // as of attend.cuh, of `state_count` states a query, of which block x makes number x; its fourth number is the reference, in units of log 2
    u64 lengths;
    u64 reach;    // of reach.cuh, where there is a mask
    u64 extras;   // of fold.cuh, with the noise of queries, where there are squares
    u64 squares;  // f32 [batch, kv heads, past_room] of unpack.cuh, or 0
    MaskParams mask;
    RowsRegion regions[4];  // behind the last one that has tiles: anything
    float scale;
    i32 fresh_rows, state_count;
    i32 kv_heads, group, length, query_tiles;
    i32 extras_width;
    i32 first_past, past_rows, past_room;  // of the past, which rows are there, and what there is room for
    i32 tiles_per_split;
    i32 carries;  // states go on from what they are
    i32 padding;
};

/// unpack.cuh. Grid: runs of pages × (kv heads · slices of channels) × batch.
struct UnpackParams {
    u64 pages;  // u64 [batch, kv heads, page_capacity]
    u64 rows;   // [batch, heads, rows, D]: row 0 is the packed row first_row; all at multiples of 16 bytes
    i64 batch_stride, head_stride, row_stride;
    u64 squares;      // f32 [batch, kv heads, squares_room]: of scales; or 0
    u64 wide_levels;  // as of AttendParams
    u64 origins;
    TransformParams transform;
    LevelTable levels;
    i32 first_row, row_count;  // the first one begins a page
    i32 page_capacity, kv_heads;
    i32 pages_per_block, squares_room;
};

/// merge.cuh, unfold: packed states of some splits become one state in the model's space.
struct UnfoldParams {
    u64 packed;  // f32 [batch, kv heads, query tiles, 8, splits, 4 + D]
    u64 states;  // f32 [batch, kv heads, query tiles, 8, state_count, 4 + D]
    TransformParams transform;
    i32 splits, splits_per_state, first_state, state_count;
    i32 pages_per_split, kv_heads, query_tiles;
    i32 queries;  // of a kv head; the others of its tiles have no states
};

/// merge.cuh, merge: states of a query become its output row. Grid: query heads · length × batch.
struct MergeParams {
    u64 states;
    u64 output;  // [batch, heads, length, D]
    i64 output_batch_stride, output_head_stride, output_position_stride;
    u64 sink_logits;  // f32 [heads] or 0
    i32 state_count, kv_heads, group, length, query_tiles;
    i32 padding;
};

/// quantize.cuh: a stream's codec.
struct CodecParams {
    u64 levels;  // f32 [level count], or pairs [8, 2], or for parts [62]: 2^b levels from 2^b − 2 on
    TransformParams transform;
    float clip;
    i32 rule;  // 0: norm, 1: range
    i32 refinements, unbiased;
    i32 uniform;  // levels are code − (n − 1) / 2
    i32 padding;
};

/// encode.cuh. Rows first_row … first_row + rows − 1 of the packed past. Grid: row blocks × kv heads × batch.
struct EncodeParams {
    u64 rows;  // [batch, heads, rows, D], row 0 is the packed row first_row
    i64 batch_stride, head_stride, row_stride;
    u64 pages;    // u64 [batch, kv heads, page capacity]
    u64 origins;  // i32 [batch] or 0: position of packed row 0, for a mean that turns
    u64 refused;  // i32: rows that could not be encoded are counted here, and stored as NaN
    CodecParams codec;
    i32 first_row, row_count;
    i32 page_capacity, kv_heads;
};

/// append.cuh: one stream of a new token.
struct AppendStream {
    u64 row;  // [batch, heads, D]
    i64 batch_stride, head_stride;
    u64 ring;   // [batch, heads, ring rows, D]
    u64 pages;  // u64 [batch, kv heads, page capacity]
    CodecParams codec;
};
/// append.cuh. Grid: 2 streams × kv heads × batch.
struct AppendParams {
    AppendStream keys, values;
    u64 origins, refused;  // of EncodeParams
    u64 lengths;           // those with the new token, and where the window begins with it
    i32 leaves;            // 1: the window was full, the row in front of it becomes the last packed one; 0: not so; −1: as the numbers behind the
                           // lengths say, where no block is complete (append_block.cuh)
    i32 ring_rows, page_capacity, kv_heads;
};

/// attend_once.cuh. Grid: kv heads × batch × (splits of packed rows + those of the regions + 2 where a token enters). Of `fold` and `attend` neither folded
/// queries, extras nor states are used: the states of packed rows are among those of `plain`, from first_state on.
struct OnceParams {
    FoldParams fold;
    AttendParams attend;
    PlainParams plain;
    TransformParams values;
    MergeParams merge;
    AppendParams append;  // of a token that enters; `leaves` is not used
    u64 arrivals;         // i32 [batch · kv heads + 1], zeros before and after, by which blocks count themselves; or 0
    u64 overflow;         // i32: tokens that entered though there was no room
    i32 first_state;
    i32 merges;  // the last block of a kv head merges; otherwise a launch behind this one does
};

/// statistics.cuh. Grid: blocks × kv heads × batch.
struct StatisticsParams {
    u64 rows;  // [batch, heads, rows, D]: those of the first of the blocks on
    i64 batch_stride, head_stride, row_stride;
    u64 paddings;  // i32 [batch] or 0: rows of packed past that are padding
    u64 shift, scale;  // f32 [batch, heads, block capacity, D]
    u64 factors;       // f32 [batch, heads, D] of queries.cuh, or 0; a head whose first one is 0 has none yet
    double exponent, exponent_alone;  // of the spread, with factors and without
    i32 block, first_block, block_capacity, kv_heads;
    i32 with_shift;
    i32 padding;
};

/// queries.cuh, query_squares. Queries of the tokens first_token … first_token + length − 1.
struct QueryParams {
    u64 query;  // [batch, heads, length, D]
    i64 batch_stride, head_stride, position_stride;
    u64 paddings;  // i32 [batch] or 0: tokens of padding before each sequence
    u64 partial;   // f64 [batch, kv heads, parts, D]
    i32 first_token, length, group, kv_heads;
    i32 parts, padding;
};

/// queries.cuh, query_factors.
struct FactorParams {
    u64 partial;   // of query_squares, or 0
    u64 squares;   // f64 [batch, kv heads, D + 1]: sums, and the tokens that were seen
    u64 factors;   // f32 [batch, kv heads, D]
    u64 paddings;
    double exponent;
    i32 first_token, length, kv_heads, parts;
    i32 starts;  // nothing was seen before: squares and factors have no values
    i32 fixes;
};

/// append_block.cuh: one stream of a new token that may complete a block.
struct AppendBlockStream {
    EncodeParams encode;          // rows: the ring; which of them leave is behind the lengths
    StatisticsParams statistics;  // rows: the new one; which block is complete is behind the lengths. block 0: the stream has none
};
/// append_block.cuh. Grid: 2 streams × kv heads × batch.
struct AppendBlockParams {
    AppendBlockStream keys, values;
    FactorParams factors;  // of the keys; squares 0: they are fixed, or queries have no say
    u64 lengths;           // those with the new token
    i32 ring_rows, padding;
};

/// decode.cuh. Grid: row blocks × kv heads × batch.
struct DecodeParams {
    u64 pages;
    u64 rows;  // [batch, heads, rows, D]: row 0 is the packed row first_row
    i64 batch_stride, head_stride, row_stride;
    u64 levels;
    u64 origins;
    TransformParams transform;
    i32 first_row, row_count, page_capacity, kv_heads;
};

// Rust has the same sizes; none of the structs has room between its fields.
static_assert(sizeof(LevelTable) == 136, "LevelTable");
static_assert(sizeof(RepackParams) == 32, "RepackParams");
static_assert(sizeof(TransformParams) == 80, "TransformParams");
static_assert(sizeof(WaveParams) == 48, "WaveParams");
static_assert(sizeof(FoldParams) == 168, "FoldParams");
/// rows.cuh, copy_rows. Row r of the target is row r + source_shift + shifts[batch] of the source, where the source has it. Strides in bytes.
/// Where there is a table, rows lie in its pages: row r in page r / 128.
struct CopyParams {
    u64 source, target;
    u64 source_table, target_table;  // u64 [batch, heads, table_pages] or 0
    u64 sequences;  // i32 [batch] or 0: which sequence of the source each one of the target is
    u64 shifts;     // i32 [batch] or 0
    i64 source_batch_stride, source_head_stride, source_row_stride;
    i64 target_batch_stride, target_head_stride, target_row_stride;
    i32 row_words;  // words of a row
    i32 rows;       // of the target
    i32 source_rows, source_shift;
    i32 source_first, source_ring;  // row r lies at (first + r) mod ring; ring 0: at first + r
    i32 target_first, target_ring;
    i32 table_pages, padding;
};

/// rows.cuh, poke: words of 8 bytes that the launch carries itself, so that nothing of the host's must outlive the call.
struct FewWords {
    u64 targets[4];  // addresses
    u64 values[4];
    i32 count, padding;
};
struct ManyWords {
    u64 targets[250];
    u64 values[250];
    i32 count, padding;
};

/// rows.cuh, advance: one more token in a store that replays steps.
struct StepParams {
    u64 lengths;   // and what is behind them
    u64 overflow;  // i32: steps for which there was no room
    i32 ring_rows;
    i32 most_tokens;  // that there is room for
    i32 window;       // rows of it at least
    i32 block_rows;   // that share statistics, or 0
};

static_assert(sizeof(CopyParams) == 136, "CopyParams");
static_assert(sizeof(StepParams) == 32, "StepParams");
static_assert(sizeof(FewWords) == 72, "FewWords");
static_assert(sizeof(ManyWords) == 4008, "ManyWords");
static_assert(sizeof(FoldTurnedParams) == 224, "FoldTurnedParams");
static_assert(sizeof(TurningParams) == 192, "TurningParams");
static_assert(sizeof(MaskParams) == 56, "MaskParams");
static_assert(sizeof(EnterParams) == 16, "EnterParams");
static_assert(sizeof(AttendParams) == 536, "AttendParams");
static_assert(sizeof(PlainRegion) == 104, "PlainRegion");
static_assert(sizeof(PlainParams) == 568, "PlainParams");
static_assert(sizeof(OnceParams) == 1792, "OnceParams");
static_assert(sizeof(ReachParams) == 96, "ReachParams");
static_assert(sizeof(RowsRegion) == 112, "RowsRegion");
static_assert(sizeof(RowsParams) == 632, "RowsParams");
static_assert(sizeof(UnpackParams) == 304, "UnpackParams");
static_assert(sizeof(UnfoldParams) == 128, "UnfoldParams");
static_assert(sizeof(MergeParams) == 72, "MergeParams");
static_assert(sizeof(CodecParams) == 112, "CodecParams");
static_assert(sizeof(EncodeParams) == 184, "EncodeParams");
static_assert(sizeof(AppendStream) == 152, "AppendStream");
static_assert(sizeof(AppendParams) == 344, "AppendParams");
static_assert(sizeof(StatisticsParams) == 104, "StatisticsParams");
static_assert(sizeof(AppendBlockStream) == 288, "AppendBlockStream");
static_assert(sizeof(AppendBlockParams) == 656, "AppendBlockParams");
static_assert(sizeof(QueryParams) == 72, "QueryParams");
static_assert(sizeof(FactorParams) == 64, "FactorParams");
static_assert(sizeof(DecodeParams) == 152, "DecodeParams");

}  // namespace skvq

//! What kernels take, as `kernels/params.cuh` declares it: the same structs, field by field, with the sizes that C++ asserts too.
//!
//! Addresses are the device's. What a field means is said there; a field without a value is 0, which means none.

use std::mem::{offset_of, zeroed};

use super::launch::Parameters;

/// Name, size and the fields' names and offsets of a struct.
pub struct StructLayout {
    pub name: &'static str,
    pub size: usize,
    pub fields: Vec<(&'static str, usize)>,
}

macro_rules! parameters {
    ($($name:ident: $size:literal { $($field:ident: $kind:ty),* $(,)? })*) => {
        $(
            #[repr(C)]
            #[derive(Clone, Copy)]
            pub struct $name {
                $(pub $field: $kind,)*
            }

            impl Default for $name {
                fn default() -> Self {
                    // SAFETY: integers and floats, for which zeros are values.
                    unsafe { zeroed() }
                }
            }

            const _: () = assert!(size_of::<$name>() == $size && align_of::<$name>().is_power_of_two());

            // SAFETY: repr(C), numbers only, with the padding spelled out; the test of `layouts` compares it with C++.
            unsafe impl Parameters for $name {}
        )*

        /// Of all structs here.
        pub fn layouts() -> Vec<StructLayout> {
            vec![$(StructLayout {
                name: stringify!($name),
                size: size_of::<$name>(),
                fields: vec![$((stringify!($field), offset_of!($name, $field))),*],
            }),*]
        }
    };
}

parameters! {
    LevelTable: 136 { low: [u32; 16], high: [u32; 16], step: f32, correction: f32 }

    TransformParams: 80 {
        shift: u64, scale: u64, permutation: u64, matrix: u64, inverse: u64, shift_sine: u64, spans: u64, steps: u64,
        rotation: i32, pages_per_block: i32, block_count: i32, first_span: i32,
    }

    WaveParams: 48 {
        waves: u64, channels: u64, spans: u64, steps: u64, origins: u64, first_span: i32, frequencies: i32,
    }

    FoldParams: 168 {
        query: u64, query_batch_stride: i64, query_head_stride: i64, query_position_stride: i64,
        folded: u64, extras: u64, noise: u64, lengths: u64, transform: TransformParams,
        scale: f32, kv_heads: i32, group: i32, length: i32, query_tiles: i32, as_bytes: i32,
    }

    FoldTurnedParams: 224 { fold: FoldParams, waves: WaveParams, factors: u64 }

    TurningParams: 192 {
        query: u64, query_batch_stride: i64, query_head_stride: i64, query_position_stride: i64,
        bias: u64, origins: u64, lengths: u64, transform: TransformParams, waves: u64, channels: u64, capacity: i64,
        scale: f32, kv_heads: i32, group: i32, length: i32, query_tiles: i32, batch: i32, frequencies: i32, padding: i32,
    }

    MaskParams: 56 {
        mask: u64, batch_stride: i64, head_stride: i64, position_stride: i64, paddings: u64,
        kind: i32, causal: i32, softcap: f32, total_from_lengths_plus: i32,
    }

    EnterParams: 16 { window: i32, ring_rows: i32, most_tokens: i32, padding: i32 }

    AttendParams: 536 {
        key_pages: u64, value_pages: u64, folded: u64, extras: u64, bias: u64, states: u64, lengths: u64, reach: u64,
        key_wide_levels: u64, value_wide_levels: u64, bias_capacity: i64, enter: EnterParams, turned: WaveParams,
        mask: MaskParams, key_levels: LevelTable, value_levels: LevelTable,
        weight_unit: f32, page_capacity: i32, pages_per_split: i32, splits: i32, long_splits: i32, short_pages: i32,
        pages_per_key_block: i32, key_blocks: i32,
        kv_heads: i32, group: i32, length: i32, query_tiles: i32, as_bytes: i32, padding: i32,
    }

    PlainRegion: 104 {
        key_rows: u64, value_rows: u64, key_table: u64, value_table: u64,
        key_batch_stride: i64, key_head_stride: i64, key_row_stride: i64,
        value_batch_stride: i64, value_head_stride: i64, value_row_stride: i64,
        kind: i32, splits: i32, rows_per_split: i32, ring_first: i32, ring_rows: i32, table_pages: i32,
    }

    PlainParams: 568 {
        query: u64, query_batch_stride: i64, query_head_stride: i64, query_position_stride: i64,
        states: u64, lengths: u64, mask: MaskParams, enter: EnterParams, regions: [PlainRegion; 4],
        scale: f32, fresh_rows: i32, state_count: i32,
        kv_heads: i32, group: i32, length: i32, query_tiles: i32, padding: i32,
    }

    ReachParams: 96 {
        mask: MaskParams, reach: u64, lengths: u64, heads: i32, positions: i32, tokens: i32,
        entering: i32, least_padding: i32, padding: i32,
    }

    RowsRegion: 112 { rows: PlainRegion, tiles: i32, padding: i32 }

    RowsParams: 632 {
        query: u64, query_batch_stride: i64, query_head_stride: i64, query_position_stride: i64,
        states: u64, lengths: u64, reach: u64, extras: u64, squares: u64, mask: MaskParams, regions: [RowsRegion; 4],
        scale: f32, fresh_rows: i32, state_count: i32,
        kv_heads: i32, group: i32, length: i32, query_tiles: i32,
        extras_width: i32, first_past: i32, past_rows: i32, past_room: i32, tiles_per_split: i32, carries: i32, padding: i32,
    }

    UnpackParams: 304 {
        pages: u64, rows: u64, batch_stride: i64, head_stride: i64, row_stride: i64,
        squares: u64, wide_levels: u64, origins: u64, transform: TransformParams, levels: LevelTable,
        first_row: i32, row_count: i32, page_capacity: i32, kv_heads: i32, pages_per_block: i32, squares_room: i32,
    }

    UnfoldParams: 128 {
        packed: u64, states: u64, transform: TransformParams,
        splits: i32, splits_per_state: i32, first_state: i32, state_count: i32,
        pages_per_split: i32, kv_heads: i32, query_tiles: i32, queries: i32,
    }

    MergeParams: 72 {
        states: u64, output: u64, output_batch_stride: i64, output_head_stride: i64, output_position_stride: i64,
        sink_logits: u64, state_count: i32, kv_heads: i32, group: i32, length: i32, query_tiles: i32, padding: i32,
    }

    CodecParams: 112 {
        levels: u64, transform: TransformParams,
        clip: f32, rule: i32, refinements: i32, unbiased: i32, uniform: i32, padding: i32,
    }

    EncodeParams: 184 {
        rows: u64, batch_stride: i64, head_stride: i64, row_stride: i64,
        pages: u64, origins: u64, refused: u64, codec: CodecParams,
        first_row: i32, row_count: i32, page_capacity: i32, kv_heads: i32,
    }

    AppendStream: 152 {
        row: u64, batch_stride: i64, head_stride: i64, ring: u64, pages: u64, codec: CodecParams,
    }

    AppendParams: 344 {
        keys: AppendStream, values: AppendStream, origins: u64, refused: u64, lengths: u64,
        leaves: i32, ring_rows: i32, page_capacity: i32, kv_heads: i32,
    }

    OnceParams: 1792 {
        fold: FoldParams, attend: AttendParams, plain: PlainParams, values: TransformParams, merge: MergeParams,
        append: AppendParams, arrivals: u64, overflow: u64, first_state: i32, merges: i32,
    }

    StatisticsParams: 104 {
        rows: u64, batch_stride: i64, head_stride: i64, row_stride: i64, paddings: u64, shift: u64, scale: u64,
        factors: u64, exponent: f64, exponent_alone: f64,
        block: i32, first_block: i32, block_capacity: i32, kv_heads: i32, with_shift: i32, padding: i32,
    }

    QueryParams: 72 {
        query: u64, batch_stride: i64, head_stride: i64, position_stride: i64, paddings: u64, partial: u64,
        first_token: i32, length: i32, group: i32, kv_heads: i32, parts: i32, padding: i32,
    }

    FactorParams: 64 {
        partial: u64, squares: u64, factors: u64, paddings: u64, exponent: f64,
        first_token: i32, length: i32, kv_heads: i32, parts: i32, starts: i32, fixes: i32,
    }

    DecodeParams: 152 {
        pages: u64, rows: u64, batch_stride: i64, head_stride: i64, row_stride: i64,
        levels: u64, origins: u64, transform: TransformParams,
        first_row: i32, row_count: i32, page_capacity: i32, kv_heads: i32,
    }

    AppendBlockStream: 288 { encode: EncodeParams, statistics: StatisticsParams }

    AppendBlockParams: 656 {
        keys: AppendBlockStream, values: AppendBlockStream, factors: FactorParams, lengths: u64, ring_rows: i32, padding: i32,
    }

    StepParams: 32 { lengths: u64, overflow: u64, ring_rows: i32, most_tokens: i32, window: i32, block_rows: i32 }

    CopyParams: 136 {
        source: u64, target: u64, source_table: u64, target_table: u64, sequences: u64, shifts: u64,
        source_batch_stride: i64, source_head_stride: i64, source_row_stride: i64,
        target_batch_stride: i64, target_head_stride: i64, target_row_stride: i64,
        row_words: i32, rows: i32, source_rows: i32, source_shift: i32,
        source_first: i32, source_ring: i32, target_first: i32, target_ring: i32, table_pages: i32, padding: i32,
    }

    FewWords: 72 { targets: [u64; 4], values: [u64; 4], count: i32, padding: i32 }

    ManyWords: 4008 { targets: [u64; 250], values: [u64; 250], count: i32, padding: i32 }
}

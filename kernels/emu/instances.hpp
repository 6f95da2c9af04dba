// The instances that an emulated driver has: one codec of each kind, at the sizes that tests of a whole cache use.
//
// A line each, as NVRTC's name expressions are written. What is not here is CUDA_ERROR_NOT_FOUND when a module is asked for it.
#pragma once
#include "append.cuh"
#include "append_block.cuh"
#include "attend_many.cuh"
#include "attend_once.cuh"
#include "decode.cuh"
#include "encode.cuh"
#include "merge.cuh"
#include "plain.cuh"
#include "registry.hpp"
#include "repack.cuh"
#include "rows.cuh"
#include "statistics.cuh"
#include "turning.cuh"

namespace skvq {
using Keys2 = Layout<keys, 64, 2, 64, 1, 1>;
using Values2 = Layout<values, 64, 2, 64, 1, 1>;
using ValuesTernary = Layout<values, 64, format_ternary, 64, 1, 1>;
/// Parts (4, 16), (2, 32), (1, 16).
constexpr u64 example_parts = (4 | 1 << 3) | (2 | 2 << 3) << 8 | (1 | 1 << 3) << 16;
using KeysParts = Layout<keys, 64, format_parts, 64, 1, 1, example_parts>;
using ValuesParts = Layout<values, 64, format_parts, 64, 1, 1, example_parts>;
}  // namespace skvq

#define SKVQ_STREAM_INSTANCES(type, layout)    \
    INSTANCE(skvq::encode<type, skvq::layout>) \
    INSTANCE(skvq::decode<type, skvq::layout>) \
    INSTANCE(skvq::rows_to_page<skvq::layout>) \
    INSTANCE(skvq::page_to_rows<skvq::layout>)

SKVQ_STREAM_INSTANCES(float, Keys2)
SKVQ_STREAM_INSTANCES(float, Values2)
SKVQ_STREAM_INSTANCES(float, ValuesTernary)
SKVQ_STREAM_INSTANCES(float, KeysParts)
SKVQ_STREAM_INSTANCES(float, ValuesParts)
INSTANCE(skvq::append_row<float, skvq::Keys2, skvq::Values2>)
INSTANCE(skvq::append_row<float, skvq::Keys2, skvq::ValuesTernary>)
INSTANCE(skvq::append_row<float, skvq::KeysParts, skvq::ValuesParts>)
INSTANCE(skvq::append_block<float, skvq::Keys2, skvq::ValuesTernary>)
INSTANCE(skvq::attend<skvq::Keys2, skvq::Values2, 1>)
INSTANCE(skvq::attend<skvq::Keys2, skvq::ValuesTernary, 1>)
INSTANCE(skvq::attend<skvq::KeysParts, skvq::ValuesParts, 1>)
INSTANCE(skvq::attend_apart<skvq::Keys2, skvq::ValuesTernary, 1>)
INSTANCE(skvq::attend_many<skvq::Keys2, skvq::ValuesTernary>)
INSTANCE(skvq::attend_once<float, skvq::Keys2, skvq::Values2>)
INSTANCE(skvq::attend_once<float, skvq::Keys2, skvq::ValuesTernary>)
INSTANCE(skvq::attend_once<float, skvq::KeysParts, skvq::ValuesParts>)
INSTANCE(skvq::fold<float, skvq::Keys2>)
INSTANCE(skvq::fold<float, skvq::KeysParts>)
INSTANCE(skvq::turning<float, 64>)
INSTANCE(skvq::plain<float, 64, 64>)
INSTANCE(skvq::unfold<64>)
INSTANCE(skvq::merge<float, 64>)
INSTANCE(skvq::block_statistics<float, 64>)
INSTANCE(skvq::copy_rows<skvq::U32x4>)
INSTANCE(skvq::copy_rows<skvq::u32>)
INSTANCE(skvq::copy_rows<skvq::u16>)
INSTANCE(skvq::advance<skvq::i32>)
INSTANCE(skvq::poke<skvq::FewWords>)
INSTANCE(skvq::poke<skvq::ManyWords>)

//! Sixteen lanes: the one vector abstraction that the kernels are written on.
//!
//! What it is: the trait [`Lanes`] (16 lanes of f32, u32 and booleans), one implementation per instruction set ([`Avx512`], [`Avx2`],
//! [`Neon`], [`Portable`]), the run-time choice between them ([`Isa`]), and [`multiversion!`], which turns a kernel that is generic over
//! `Lanes` into a function that runs the copy compiled for an [`Isa`]. What it is not: a kernel; it knows no format, page or tensor.
//!
//! A kernel is `#[inline(always)] unsafe fn kernel<S: Lanes>(..)`; so is everything that it calls with vectors, because an instruction set
//! is switched on per function (`#[target_feature]` on the wrapper that `multiversion!` writes) and only what is inlined into that wrapper
//! is compiled for it. A closure inside a kernel need not be inlined: write loops.
//!
//! # Which results are the same on every instruction set
//!
//! All of them bit for bit, as FORMAT.md needs it for codes, except those that say otherwise: [`Lanes::mul_add`] (fused or not),
//! [`Lanes::reduce_add_4`] and [`Lanes::reduce_add_16`] (any order) and what is built on them ([`Lanes::exp`]). "Bit for bit" leaves the
//! payload and sign of a NaN open.

#![allow(clippy::inline_always, reason = "an operation that is not inlined is not compiled for its instruction set")]
#![allow(clippy::wildcard_imports, reason = "std::arch: dozens of intrinsics a file, all with prefixes")]

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod bytes;
mod lanes;
pub(crate) mod levels;
pub(crate) mod matmul;
#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
mod neon;
pub(crate) mod panel_words;
pub(crate) mod panels;
pub(crate) mod part_words;
mod portable;
pub(crate) mod products;
pub(crate) mod rows;
#[cfg(test)]
mod tests;
pub(crate) mod vectors;
pub(crate) mod words;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512;
pub(crate) use lanes::Lanes;
#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
pub(crate) use neon::Neon;
pub(crate) use portable::Portable;

use std::fmt;

/// The lanes of every vector.
pub(crate) const LANES: usize = 16;

/// Asks for the cache lines of `data`, which will be read soon. Nothing where the language has no stable way to ask.
pub(crate) fn prefetch<T>(data: &[T]) {
    #[cfg(target_arch = "x86_64")]
    for line in data.chunks(64 / size_of::<T>()) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a hint about memory that the slice borrows; SSE is part of x86-64.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = data;
}

/// The instruction sets that this target can be compiled for, best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IsaKind {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
    Neon,
    Portable,
}

/// An instruction set **that this processor has**: the field is private and only [`Isa::available`] fills it, so holding one is the
/// proof that the functions made by [`multiversion!`] need in order to be safe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Isa(IsaKind);

impl Isa {
    /// The instruction sets of this processor, best first; the last one is always `portable`.
    ///
    /// `avx512` means F, BW, VL, DQ, VBMI and VNNI (Ice Lake, Zen 4 and later). A processor with less of it (Skylake-X, Cascade Lake) runs
    /// `avx2`, which means AVX2, FMA, F16C and the bit instructions that came with them (Haswell, Zen and later).
    pub fn available() -> Vec<Self> {
        let mut found = Vec::with_capacity(3);
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c")
                && is_x86_feature_detected!("bmi1")
                && is_x86_feature_detected!("bmi2")
                && is_x86_feature_detected!("popcnt");
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vbmi")
                && is_x86_feature_detected!("avx512vnni");
            if avx2 && avx512 {
                found.push(Self(IsaKind::Avx512));
            }
            if avx2 {
                found.push(Self(IsaKind::Avx2));
            }
        }
        #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
        if std::arch::is_aarch64_feature_detected!("neon") {
            found.push(Self(IsaKind::Neon));
        }
        found.push(Self(IsaKind::Portable));
        found
    }

    /// The best instruction set of this processor.
    pub fn best() -> Self {
        Self::available()[0]
    }

    /// The instruction set called `name`, if this processor has it.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::available().into_iter().find(|isa| isa.name() == name)
    }

    /// `avx512`, `avx2`, `neon` or `portable`.
    pub const fn name(self) -> &'static str {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            IsaKind::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            IsaKind::Avx2 => "avx2",
            #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
            IsaKind::Neon => "neon",
            IsaKind::Portable => "portable",
        }
    }

    pub const fn kind(self) -> IsaKind {
        self.0
    }

    /// Whether it has the products of [`words`].
    pub(crate) const fn has_words(self) -> bool {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            IsaKind::Avx512 => Avx512::WORDS,
            #[cfg(target_arch = "x86_64")]
            IsaKind::Avx2 => Avx2::WORDS,
            #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
            IsaKind::Neon => Neon::WORDS,
            IsaKind::Portable => Portable::WORDS,
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

/// Declares functions that run a generic kernel on the instruction set given as their first argument.
///
/// ```text
/// multiversion! {
///     /// The dot products of a query with the rows of a page.
///     pub(crate) fn score_page(query: &[f32], page: &Page, scores: &mut [f32]) = kernels::score_page;
///     pub(crate) unsafe fn decode_rows_bf16(source: *const u8, rows: usize) -> usize = kernels::decode_rows<Bf16, 128>;
/// }
/// // declares fn score_page(isa: Isa, query: &[f32], page: &Page, scores: &mut [f32]), which calls
/// // kernels::score_page::<Avx512>(query, page, scores), kernels::decode_rows::<Avx512, Bf16, 128>(source, rows), ...
/// ```
///
/// The kernel's first type parameter is the [`Lanes`]; further ones are listed in `<..>`, one identifier, literal or `{..}` each.
/// Every kernel is an `unsafe fn`. **A declaration without `unsafe` promises that its kernel asks for nothing but the processor features
/// of its `Lanes`**; the [`Isa`] proves those. A kernel with conditions of its own (pointers) is declared `unsafe fn`.
macro_rules! multiversion {
    () => {};
    ($(#[$meta:meta])* $vis:vis unsafe fn $name:ident $(<$($life:lifetime),+>)? ($($arg:ident: $type:ty),* $(,)?) $(-> $ret:ty)?
        = $($path:ident)::+ $(<$($param:tt),+ $(,)?>)?; $($rest:tt)*) => {
        $(#[$meta])*
        $vis unsafe fn $name $(<$($life),+>)? (isa: $crate::backend::simd::Isa, $($arg: $type),*) $(-> $ret)? {
            $crate::backend::simd::multiversion!(
                @body isa, [$($($life),+)?] ($($arg: $type),*) [$($ret)?] [$($path)::+] [$($($param),+)?])
        }
        $crate::backend::simd::multiversion! { $($rest)* }
    };
    ($(#[$meta:meta])* $vis:vis fn $name:ident $(<$($life:lifetime),+>)? ($($arg:ident: $type:ty),* $(,)?) $(-> $ret:ty)?
        = $($path:ident)::+ $(<$($param:tt),+ $(,)?>)?; $($rest:tt)*) => {
        $(#[$meta])*
        $vis fn $name $(<$($life),+>)? (isa: $crate::backend::simd::Isa, $($arg: $type),*) $(-> $ret)? {
            $crate::backend::simd::multiversion!(
                @body isa, [$($($life),+)?] ($($arg: $type),*) [$($ret)?] [$($path)::+] [$($($param),+)?])
        }
        $crate::backend::simd::multiversion! { $($rest)* }
    };
    (@body $isa:ident, [$($life:lifetime),*] ($($arg:ident: $type:ty),*) [$($ret:ty)?] [$($path:ident)::+] [$($param:tt),*]) => {{
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,avx2,fma,f16c,bmi1,bmi2,popcnt")]
        unsafe fn avx512<$($life),*>($($arg: $type),*) $(-> $ret)? {
            // SAFETY: the features of Avx512 are enabled here; the kernel's other conditions are the caller's.
            unsafe { $($path)::+::<$crate::backend::simd::Avx512 $(, $param)*>($($arg),*) }
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,popcnt")]
        unsafe fn avx2<$($life),*>($($arg: $type),*) $(-> $ret)? {
            // SAFETY: the features of Avx2 are enabled here; the kernel's other conditions are the caller's.
            unsafe { $($path)::+::<$crate::backend::simd::Avx2 $(, $param)*>($($arg),*) }
        }
        #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
        #[target_feature(enable = "neon")]
        unsafe fn neon<$($life),*>($($arg: $type),*) $(-> $ret)? {
            // SAFETY: the features of Neon are enabled here; the kernel's other conditions are the caller's.
            unsafe { $($path)::+::<$crate::backend::simd::Neon $(, $param)*>($($arg),*) }
        }
        match $isa.kind() {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: an Isa exists only for features that were detected; the kernel's other conditions are the caller's.
            $crate::backend::simd::IsaKind::Avx512 => unsafe { avx512($($arg),*) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            $crate::backend::simd::IsaKind::Avx2 => unsafe { avx2($($arg),*) },
            #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
            // SAFETY: as above.
            $crate::backend::simd::IsaKind::Neon => unsafe { neon($($arg),*) },
            // SAFETY: Portable needs no features.
            $crate::backend::simd::IsaKind::Portable => unsafe {
                $($path)::+::<$crate::backend::simd::Portable $(, $param)*>($($arg),*)
            },
        }
    }};
}
pub(crate) use multiversion;

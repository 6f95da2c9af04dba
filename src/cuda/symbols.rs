//! Tables of functions from libraries that are opened at run time.

/// Makes a struct of function pointers, and `resolve`, which finds them all in a library or names those that are missing.
macro_rules! function_table {
    ($table:ident: $($field:ident = $symbol:literal: fn($($argument:ty),* $(,)?) -> $result:ty;)*) => {
        pub(super) struct $table {
            $(pub(super) $field: unsafe extern "C" fn($($argument),*) -> $result,)*
        }

        impl $table {
            /// The pointers are good as long as `library` stays open.
            fn resolve(library: &libloading::Library) -> std::result::Result<Self, Vec<&'static str>> {
                let mut missing = Vec::new();
                $(
                    // SAFETY: the signatures are those of the header that the table's comment names.
                    let $field = unsafe { library.get::<unsafe extern "C" fn($($argument),*) -> $result>($symbol) };
                    let $field = $field.map(|function| *function).map_err(|_| missing.push($symbol)).ok();
                )*
                match ($($field,)*) {
                    ($(Some($field),)*) => Ok(Self { $($field),* }),
                    _ => Err(missing),
                }
            }
        }
    };
}

pub(super) use function_table;

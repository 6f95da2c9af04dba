//! Names of GPU architectures that kernels are compiled for, `sm_80`, `sm_90a`, `sm_120a`.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};

/// The oldest compute capability with the instructions that the kernels use: asynchronous copies, bf16 matrix products.
pub const OLDEST: i32 = 80;
/// From here on the name ends in `a`: code for exactly this chip, with the instructions that only it has.
const FIRST_SPECIFIC: i32 = 90;

/// One architecture. `a` and `f` at the end of a name ask for the instructions of a chip or of its family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Arch {
    /// 10 · major + minor of the compute capability.
    pub capability: i32,
    suffix: Option<char>,
}

impl Arch {
    /// What a device of compute capability major.minor runs best.
    pub fn of_capability(major: i32, minor: i32) -> Self {
        let capability = 10 * major + minor;
        Self { capability, suffix: (capability >= FIRST_SPECIFIC).then_some('a') }
    }

    /// Refuses devices that the kernels are not written for; `device` is its name.
    pub fn expect_supported(self, device: &str) -> Result<()> {
        if self.capability >= OLDEST {
            return Ok(());
        }
        let (major, minor) = (self.capability / 10, self.capability % 10);
        Err(Error::Unsupported {
            name: format!("{device} (compute capability {major}.{minor})"),
            reason: format!("the kernels need {}.{} or newer", OLDEST / 10, OLDEST % 10),
        })
    }
}

impl fmt::Display for Arch {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "sm_{}", self.capability)?;
        self.suffix.map_or(Ok(()), |suffix| write!(formatter, "{suffix}"))
    }
}

impl FromStr for Arch {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let refused = || Error::value("arch", "a name such as sm_80, sm_90a or sm_120a", format!("{text:?}"));
        let name = text.strip_prefix("sm_").ok_or_else(refused)?;
        let digits = name.trim_end_matches(['a', 'f']);
        let suffix = match &name[digits.len()..] {
            "" => None,
            "a" => Some('a'),
            "f" => Some('f'),
            _ => return Err(refused()),
        };
        if !digits.bytes().all(|byte| byte.is_ascii_digit()) || !(2..=3).contains(&digits.len()) {
            return Err(refused());
        }
        let arch = Self { capability: digits.parse().map_err(|_| refused())?, suffix };
        arch.expect_supported(text).map(|()| arch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_name_the_architecture_with_all_its_instructions() {
        let cases = [
            ((8, 0), "sm_80"),
            ((8, 6), "sm_86"),
            ((8, 9), "sm_89"),
            ((9, 0), "sm_90a"),
            ((10, 0), "sm_100a"),
            ((10, 3), "sm_103a"),
            ((12, 0), "sm_120a"),
        ];
        for ((major, minor), name) in cases {
            let arch = Arch::of_capability(major, minor);
            assert_eq!(arch.to_string(), name);
            assert_eq!(name.parse(), Ok(arch));
        }
        assert_eq!("sm_100f".parse::<Arch>().unwrap().to_string(), "sm_100f");
    }

    #[test]
    fn other_names_and_old_devices_are_refused() {
        for name in ["", "sm_", "90", "compute_90", "sm_90aa", "sm_90b", "sm_+9", "sm_9", "sm_1000", "sm_٩٠"] {
            let message = name.parse::<Arch>().unwrap_err().to_string();
            assert!(message.starts_with("arch: expected a name such as sm_80"), "{message}");
        }
        assert_eq!(
            "sm_75".parse::<Arch>().unwrap_err().to_string(),
            "sm_75 (compute capability 7.5) is not supported: the kernels need 8.0 or newer"
        );
    }
}

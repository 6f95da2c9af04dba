//! Compiled kernels on disk, so that a kernel is compiled once per machine and not once per process.
//!
//! One file per kernel, `DIRECTORY/cubin/KEY.cubin`:
//!
//! ```text
//!   "skvq cubin 1\n" | SHA-256 of all that follows, 32 bytes | n, u32 | name, n bytes | m, u32 | log, m bytes | CUBIN
//! ```
//!
//! Numbers are little-endian. The key is a SHA-256 of everything that the CUBIN depends on ([`Key`]), so a file is never out of date; one
//! that is damaged fails its sum, counts as missing and is replaced. A file appears under its name only when complete, so processes may
//! share a directory. A directory that cannot be read or written costs time and nothing else.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use sha2::{Digest, Sha256};

use super::nvrtc::Output;

const MAGIC: &[u8] = b"skvq cubin 1\n";
const SUM_BYTES: usize = 32;

/// Collects what a CUBIN depends on. Every part goes in with its length: no two lists of parts give the same text.
#[derive(Default)]
pub struct Key(Sha256);

impl Key {
    #[must_use]
    pub fn with(mut self, part: impl AsRef<[u8]>) -> Self {
        let part = part.as_ref();
        self.0.update((part.len() as u64).to_le_bytes());
        self.0.update(part);
        self
    }

    /// 64 hexadecimal digits.
    pub fn finish(self) -> String {
        self.0.finalize().iter().fold(String::with_capacity(64), |mut digits, byte| {
            let _ = write!(digits, "{byte:02x}"); // a String takes everything
            digits
        })
    }
}

/// A directory of compiled kernels, or none: then nothing is found and nothing kept.
#[derive(Debug, Clone, Default)]
pub struct DiskCache {
    directory: Option<PathBuf>,
}

impl DiskCache {
    /// In `directory`; None: where [`default_directory`] says.
    pub fn new(directory: Option<PathBuf>) -> Self {
        let directory = directory.or_else(|| default_directory(|name| std::env::var_os(name).map(PathBuf::from)));
        Self { directory: directory.map(|root| root.join("cubin")) }
    }

    /// Where the files are, for people.
    pub fn directory(&self) -> Option<&Path> {
        self.directory.as_deref()
    }

    fn file(&self, key: &str) -> Option<PathBuf> {
        Some(self.directory.as_ref()?.join(format!("{key}.cubin")))
    }

    /// The kernel of `key`, if a whole file of it is there.
    pub fn load(&self, key: &str) -> Option<Output> {
        unpack(&fs::read(self.file(key)?).ok()?)
    }

    /// Keeps a kernel. A directory that cannot be written is no error: the kernel is at hand all the same.
    pub fn store(&self, key: &str, output: &Output) {
        if let Some(file) = self.file(key) {
            let _ = replace(&file, &pack(output));
        }
    }
}

/// `$SKVQ_CACHE_DIR` (empty: none at all), else `$XDG_CACHE_HOME/skvq` if that is absolute, else `~/.cache/skvq`, else none.
fn default_directory(variable: impl Fn(&str) -> Option<PathBuf>) -> Option<PathBuf> {
    if let Some(directory) = variable("SKVQ_CACHE_DIR") {
        return (!directory.as_os_str().is_empty()).then_some(directory);
    }
    let absolute = |path: &PathBuf| path.is_absolute();
    let root = variable("XDG_CACHE_HOME").filter(absolute);
    let root = root.or_else(|| Some(variable("HOME").filter(absolute)?.join(".cache")));
    Some(root?.join("skvq"))
}

fn pack(output: &Output) -> Vec<u8> {
    let mut body = Vec::with_capacity(8 + output.name.len() + output.log.len() + output.cubin.len());
    for text in [&output.name, &output.log] {
        body.extend_from_slice(&(text.len() as u32).to_le_bytes());
        body.extend_from_slice(text.as_bytes());
    }
    body.extend_from_slice(&output.cubin);
    [MAGIC, Sha256::digest(&body).as_slice(), &body].concat()
}

/// None for anything that [`pack`] did not write, or not to its end.
fn unpack(file: &[u8]) -> Option<Output> {
    let (sum, body) = file.strip_prefix(MAGIC)?.split_at_checked(SUM_BYTES)?;
    if Sha256::digest(body).as_slice() != sum {
        return None;
    }
    let (name, rest) = take_text(body)?;
    let (log, cubin) = take_text(rest)?;
    Some(Output { cubin: cubin.to_vec(), name, log })
}

fn take_text(bytes: &[u8]) -> Option<(String, &[u8])> {
    let (length, rest) = bytes.split_first_chunk::<4>()?;
    let (text, rest) = rest.split_at_checked(u32::from_le_bytes(*length) as usize)?;
    Some((String::from_utf8(text.to_vec()).ok()?, rest))
}

/// Writes a file beside `path` and renames it. The name is this call's own: no process id alone, which containers that share a
/// directory may have in common.
fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    static CALLS: AtomicUsize = AtomicUsize::new(0);
    let folder = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    fs::create_dir_all(folder)?;
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_nanos();
    let call = CALLS.fetch_add(1, Ordering::Relaxed);
    let temporary = path.with_extension(format!("{}-{call}-{now:x}.tmp", std::process::id()));
    let written = File::create_new(&temporary).and_then(|mut file| file.write_all(bytes));
    let renamed = written.and_then(|()| fs::rename(&temporary, path));
    if renamed.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    renamed
}

#[cfg(test)]
mod tests {
    use super::*;

    fn output() -> Output {
        Output { cubin: vec![0, 1, 2, 255], name: "_Z1kv".into(), log: "registers: 8".into() }
    }

    #[test]
    fn a_file_gives_back_what_was_packed() {
        let back = unpack(&pack(&output())).unwrap();
        assert_eq!((back.cubin, back.name, back.log), (output().cubin, output().name, output().log));
    }

    #[test]
    fn every_damaged_byte_and_every_truncation_counts_as_missing() {
        let file = pack(&output());
        for length in 0..file.len() {
            assert!(unpack(&file[..length]).is_none(), "truncated to {length}");
        }
        for index in 0..file.len() {
            let mut damaged = file.clone();
            damaged[index] ^= 0x10;
            assert!(unpack(&damaged).is_none(), "byte {index}");
        }
        assert!(unpack(&[file, vec![0]].concat()).is_none(), "a byte too many");
    }

    #[test]
    fn lengths_that_point_outside_are_refused_even_with_a_right_sum() {
        let body = u32::MAX.to_le_bytes();
        assert!(unpack(&[MAGIC, Sha256::digest(body).as_slice(), &body].concat()).is_none());
    }

    #[test]
    fn parts_of_a_key_do_not_run_together() {
        let key = |parts: &[&str]| parts.iter().fold(Key::default(), Key::with).finish();
        assert_eq!(key(&["a", "b"]).len(), 64);
        assert_ne!(key(&["a", "b"]), key(&["ab"]));
        assert_ne!(key(&["a", "b"]), key(&["ab", ""]));
        assert_eq!(key(&["a", "b"]), key(&["a", "b"]));
    }

    #[test]
    fn the_directory_follows_the_environment() {
        let directory = |set: &[(&str, &str)]| {
            default_directory(|name| Some(PathBuf::from(set.iter().find(|(key, _)| *key == name)?.1)))
        };
        assert_eq!(directory(&[("SKVQ_CACHE_DIR", "/c"), ("HOME", "/h")]), Some("/c".into()));
        assert_eq!(directory(&[("SKVQ_CACHE_DIR", ""), ("HOME", "/h")]), None);
        assert_eq!(directory(&[("XDG_CACHE_HOME", "/x"), ("HOME", "/h")]), Some("/x/skvq".into()));
        assert_eq!(directory(&[("XDG_CACHE_HOME", "x"), ("HOME", "/h")]), Some("/h/.cache/skvq".into()));
        assert_eq!(directory(&[]), None);
    }
}

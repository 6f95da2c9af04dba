//! NVRTC, NVIDIA's run-time compiler, of any version from 12.0 on, opened from a path: source text in, CUBIN and log out.
//!
//! What it is: the library's functions, resolved once, and one compilation. What it is not: a search for the library (Python does it,
//! beside torch's own), a choice of options, a cache.

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::panic::resume_unwind;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::{ptr, thread};

use libloading::Library;

use super::symbols::function_table;
use crate::error::{Error, Result};

type Program = *mut c_void;
type Strings = *const *const c_char;

const COMPILATION_FAILED: c_int = 6; // NVRTC_ERROR_COMPILATION
/// The oldest version that all kernels are compiled with in tests (docs/cuda.md); NVRTC 11 does not know `sm_90a`.
const OLDEST: (c_int, c_int) = (12, 0);

// The signatures are those of nvrtc.h, unchanged from CUDA 12.0 to 13.x.
function_table! { Functions:
    version = "nvrtcVersion": fn(*mut c_int, *mut c_int) -> c_int;
    arch_count = "nvrtcGetNumSupportedArchs": fn(*mut c_int) -> c_int;
    archs = "nvrtcGetSupportedArchs": fn(*mut c_int) -> c_int;
    error_text = "nvrtcGetErrorString": fn(c_int) -> *const c_char;
    create = "nvrtcCreateProgram": fn(*mut Program, *const c_char, *const c_char, c_int, Strings, Strings) -> c_int;
    destroy = "nvrtcDestroyProgram": fn(*mut Program) -> c_int;
    add_name = "nvrtcAddNameExpression": fn(Program, *const c_char) -> c_int;
    compile = "nvrtcCompileProgram": fn(Program, c_int, Strings) -> c_int;
    log_size = "nvrtcGetProgramLogSize": fn(Program, *mut usize) -> c_int;
    log = "nvrtcGetProgramLog": fn(Program, *mut c_char) -> c_int;
    cubin_size = "nvrtcGetCUBINSize": fn(Program, *mut usize) -> c_int;
    cubin = "nvrtcGetCUBIN": fn(Program, *mut c_char) -> c_int;
    lowered_name = "nvrtcGetLoweredName": fn(Program, *const c_char, *mut *const c_char) -> c_int;
}

/// One opened NVRTC. It stays open: its threads and tables do not survive being unloaded.
pub struct Nvrtc {
    functions: Functions,
    path: String,
    version: (i32, i32),
    file_bytes: u64,
    architectures: Vec<i32>,
    _library: Library,
}

/// What one compilation takes. `headers` are (name, text); `source` may include each by its name.
pub struct Unit<'a> {
    pub source: &'a str,
    pub headers: &'a [(&'a str, &'a str)],
    /// The kernel to instantiate, e.g. `decode<half, 128>`.
    pub expression: &'a str,
    pub options: &'a [String],
}

/// What one compilation gives.
pub struct Output {
    pub cubin: Vec<u8>,
    /// The kernel's name in the CUBIN.
    pub name: String,
    /// Warnings and what the options asked the compiler to say.
    pub log: String,
}

impl Nvrtc {
    /// The library at `path`, opened by the first call with that path.
    pub fn open(path: &str) -> Result<Arc<Self>> {
        static OPENED: OnceLock<Mutex<HashMap<String, Arc<Nvrtc>>>> = OnceLock::new();
        let mut opened = OPENED.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = opened.get(path) {
            return Ok(Arc::clone(known));
        }
        let nvrtc = Arc::new(Self::load(path)?);
        opened.insert(path.into(), Arc::clone(&nvrtc));
        Ok(nvrtc)
    }

    fn load(path: &str) -> Result<Self> {
        // SAFETY: the initialisers of NVRTC register nothing beyond its own tables.
        let library = unsafe { Library::new(path) }.map_err(|error| Error::nvrtc(path, "dlopen", error))?;
        let functions = Functions::resolve(&library)
            .map_err(|missing| Error::nvrtc(path, "dlsym", format!("it lacks {}", missing.join(", "))))?;
        let mut nvrtc = Self {
            functions,
            path: path.into(),
            version: (0, 0),
            file_bytes: std::fs::metadata(path).map_or(0, |file| file.len()),
            architectures: Vec::new(),
            _library: library,
        };
        let (mut major, mut minor) = (0, 0);
        // SAFETY: both point to integers of this frame.
        nvrtc.check("nvrtcVersion", unsafe { (nvrtc.functions.version)(&raw mut major, &raw mut minor) })?;
        nvrtc.version = (major, minor);
        if nvrtc.version < OLDEST {
            let reason = format!("found NVRTC {major}.{minor}, expected {}.{} or newer", OLDEST.0, OLDEST.1);
            return Err(Error::nvrtc(path, "nvrtcVersion", reason));
        }
        open_builtins(path, nvrtc.version);
        nvrtc.architectures = nvrtc.list_architectures()?;
        Ok(nvrtc)
    }

    fn list_architectures(&self) -> Result<Vec<i32>> {
        let mut count = 0;
        // SAFETY: points to an integer of this frame.
        self.check("nvrtcGetNumSupportedArchs", unsafe { (self.functions.arch_count)(&raw mut count) })?;
        let mut found = vec![0; count.max(0) as usize];
        // SAFETY: as many integers as the call before asked for.
        self.check("nvrtcGetSupportedArchs", unsafe { (self.functions.archs)(found.as_mut_ptr()) })?;
        Ok(found)
    }

    pub fn version(&self) -> (i32, i32) {
        self.version
    }

    pub fn path(&self) -> &str {
        &self.path
    }

    /// Size of the library's file: tells apart builds of one version.
    pub fn file_bytes(&self) -> u64 {
        self.file_bytes
    }

    /// Compute capabilities that it compiles for, 10 · major + minor, ascending.
    pub fn architectures(&self) -> &[i32] {
        &self.architectures
    }

    /// Compiles one kernel; safe to call from many threads at once.
    ///
    /// In a thread of its own: NVRTC before 12.6 leaves the one that it ran in with another locale, in which Python takes text files for ASCII.
    pub fn compile(&self, unit: &Unit) -> Result<Output> {
        let compiled = thread::scope(|scope| scope.spawn(|| self.compile_here(unit)).join());
        compiled.unwrap_or_else(|panic| resume_unwind(panic))
    }

    fn compile_here(&self, unit: &Unit) -> Result<Output> {
        let program = ProgramHandle::new(self, unit)?;
        let expression = c_string("expression", unit.expression)?;
        // SAFETY: a live program that only this thread uses; the string outlives it.
        let status = unsafe { (self.functions.add_name)(program.raw, expression.as_ptr()) };
        self.check("nvrtcAddNameExpression", status)?;

        let options = CStrings::new("option", unit.options.iter().map(String::as_str))?;
        // SAFETY: the options outlive the call.
        let status = unsafe { (self.functions.compile)(program.raw, options.count(), options.as_ptr()) };
        let log = program.text("nvrtcGetProgramLog", self.functions.log_size, self.functions.log)?;
        let log = String::from_utf8_lossy(&log).trim_end_matches('\0').trim_end().to_string();
        if status == COMPILATION_FAILED {
            return Err(Error::Compile { instance: unit.expression.into(), options: unit.options.join(" "), log });
        }
        self.check("nvrtcCompileProgram", status).map_err(|error| with_log(error, &log))?;

        let cubin = program.text("nvrtcGetCUBIN", self.functions.cubin_size, self.functions.cubin)?;
        let mut name = ptr::null();
        // SAFETY: the expression is the one that was added; the name belongs to the program and is copied before that is destroyed.
        let status = unsafe { (self.functions.lowered_name)(program.raw, expression.as_ptr(), &raw mut name) };
        self.check("nvrtcGetLoweredName", status)?;
        // SAFETY: on success a string with a zero at its end, alive until the program is destroyed.
        let name = unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned();
        Ok(Output { cubin, name, log })
    }

    fn check(&self, call: &str, status: c_int) -> Result<()> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: returns a constant string for every number.
        let text = unsafe { (self.functions.error_text)(status) };
        let text = if text.is_null() {
            "unknown".into()
        } else {
            // SAFETY: not null, a constant of the library, which is open.
            unsafe { CStr::from_ptr(text) }.to_string_lossy()
        };
        Err(Error::nvrtc(&self.path, call, format!("{text} ({status})")))
    }
}

/// Some wheels' NVRTC finds its builtins library only if that is in memory already: it has no search path of its own.
/// Where there is none beside it, NVRTC searches itself.
fn open_builtins(path: &str, (major, minor): (i32, i32)) {
    let beside = Path::new(path).with_file_name(format!("libnvrtc-builtins.so.{major}.{minor}"));
    if beside.exists() {
        // SAFETY: a library of tables, without initialisers.
        if let Ok(library) = unsafe { Library::new(&beside) } {
            std::mem::forget(library); // stays open, as NVRTC does
        } // else the first compilation says what is missing
    }
}

fn with_log(error: Error, log: &str) -> Error {
    match error {
        Error::Nvrtc { path, call, reason } if !log.is_empty() => {
            Error::Nvrtc { path, call, reason: format!("{reason}\n{log}") }
        }
        other => other,
    }
}

/// A program of NVRTC, destroyed at the end of its scope.
struct ProgramHandle<'a> {
    nvrtc: &'a Nvrtc,
    raw: Program,
}

impl<'a> ProgramHandle<'a> {
    fn new(nvrtc: &'a Nvrtc, unit: &Unit) -> Result<Self> {
        let source = c_string("source", unit.source)?;
        let names = CStrings::new("header name", unit.headers.iter().map(|(name, _)| *name))?;
        let texts = CStrings::new("header", unit.headers.iter().map(|(_, text)| *text))?;
        let mut raw = ptr::null_mut();
        // SAFETY: all strings outlive the call, which copies them.
        let status = unsafe {
            (nvrtc.functions.create)(
                &raw mut raw,
                source.as_ptr(),
                c"skvq.cu".as_ptr(),
                texts.count(),
                texts.as_ptr(),
                names.as_ptr(),
            )
        };
        nvrtc.check("nvrtcCreateProgram", status)?;
        Ok(Self { nvrtc, raw })
    }

    /// The bytes that a pair of functions, size and content, gives.
    fn text(
        &self,
        call: &str,
        size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
        content: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    ) -> Result<Vec<u8>> {
        let mut bytes = 0;
        // SAFETY: a live program; points to a number of this frame.
        self.nvrtc.check(call, unsafe { size(self.raw, &raw mut bytes) })?;
        let mut text = vec![0_u8; bytes];
        // SAFETY: as many bytes as the call before asked for.
        self.nvrtc.check(call, unsafe { content(self.raw, text.as_mut_ptr().cast()) })?;
        Ok(text)
    }
}

impl Drop for ProgramHandle<'_> {
    fn drop(&mut self) {
        // SAFETY: created by this library, destroyed once. A failure leaves memory behind and nothing else.
        let _ = unsafe { (self.nvrtc.functions.destroy)(&raw mut self.raw) };
    }
}

/// Strings for C with the array of their addresses.
struct CStrings {
    _strings: Vec<CString>, // what the pointers point to
    pointers: Vec<*const c_char>,
}

impl CStrings {
    fn new<'a>(name: &str, texts: impl Iterator<Item = &'a str>) -> Result<Self> {
        let strings = texts.map(|text| c_string(name, text)).collect::<Result<Vec<_>>>()?;
        let pointers = strings.iter().map(|text| text.as_ptr()).collect();
        Ok(Self { _strings: strings, pointers })
    }

    fn count(&self) -> c_int {
        self.pointers.len() as c_int
    }

    fn as_ptr(&self) -> Strings {
        self.pointers.as_ptr()
    }
}

fn c_string(name: &str, text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| Error::value(name, "text without a zero byte", format!("{text:?}")))
}

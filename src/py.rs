//! The Python module `skvq._native`: takes arguments, lets go of the interpreter, maps errors once. No algorithm lives here.

use pyo3::create_exception;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyList;

use crate::backend::attend::{Attention, attend};
use crate::backend::simd::Isa;
use crate::backend::{cpu, threads};
use crate::codebook::Codebook;
use crate::codec::{self, Rule};
use crate::dlpack::{ImportedTensor, OwnedTensor};
use crate::error::{Error, Result};
use crate::format::{Format, Metadata, RowLayout};
use crate::layer::{self, LayerSpec, NonFinite};
use crate::tensor::Dtype;
use crate::transform::{Affine, BlockRule, Permutation, Rotation, Source};

create_exception!(skvq._native, SkvqError, PyValueError, "An argument that skvq refuses; nothing was changed.");

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        SkvqError::new_err(error.to_string())
    }
}

/// Shift and scale of one head, as Python hands them over: two float32 vectors.
type Statistics<'py> = (Bound<'py, PyAny>, Bound<'py, PyAny>);

fn isa_named(name: Option<&str>) -> Result<Isa> {
    match name {
        None => Ok(Isa::best()),
        Some(name) => Isa::from_name(name).ok_or_else(|| {
            let names: Vec<_> = Isa::available().into_iter().map(Isa::name).collect();
            Error::value("isa", format!("one of {names:?}"), name)
        }),
    }
}

/// How the rows of one stream (the keys or the values of a layer) are packed. Immutable.
#[pyclass(frozen, name = "Codec", module = "skvq._native")]
pub struct PyCodec {
    /// `raw` formats get their dtype from the layer.
    codec: codec::Codec,
}

impl PyCodec {
    fn affine(&self, head: usize, statistics: Option<Statistics>) -> Result<Affine> {
        let head_dim = self.codec.layout.head_dim;
        if let Some((shift, scale)) = statistics {
            let shift = ImportedTensor::new(&shift, "shift")?.vec_f32()?;
            let scale = ImportedTensor::new(&scale, "scale")?.vec_f32()?;
            if shift.len() != head_dim || scale.len() != head_dim {
                let found = format!("{} and {}", shift.len(), scale.len());
                return Err(Error::value("statistics", format!("shift and scale of {head_dim} channels"), found));
            }
            return Ok(Affine::new(shift, scale));
        }
        match &self.codec.source {
            Source::Block(_) => Err(Error::value("statistics", "shift and scale for a codec with blocks", "None")),
            Source::Static(affines) => self
                .codec
                .static_affine(head)
                .cloned()
                .ok_or_else(|| Error::value("head", format!("a head of the plan, 0..{}", affines.len()), head)),
        }
    }

    fn refuse_raw(&self) -> Result<()> {
        if self.codec.is_raw() {
            let reason = "rows of format \"raw\" keep the layer's dtype".to_string();
            return Err(Error::Unsupported { name: "encode and decode".into(), reason });
        }
        Ok(())
    }

    fn rows(&self, rows: &Bound<PyAny>) -> Result<(Vec<f32>, usize)> {
        let (data, [count, width]) = ImportedTensor::new(rows, "rows")?.matrix_f32()?;
        if width != self.codec.layout.head_dim {
            let expected = format!("[rows, {}]", self.codec.layout.head_dim);
            return Err(Error::shape("rows", expected, &[count as i64, width as i64]));
        }
        Ok((data, count))
    }
}

fn parse_codebook(codebook: &Bound<PyAny>, format: Format) -> PyResult<Codebook> {
    if let Ok(name) = codebook.extract::<String>() {
        return Ok(Codebook::named(&name, format)?);
    }
    if let Ok(levels) = codebook.extract::<Vec<f32>>() {
        return Ok(Codebook::levels(&levels, format)?);
    }
    let words: Vec<[f32; 2]> = codebook
        .extract()
        .map_err(|_| Error::value("codebook", "\"uniform\", \"lloyd-max\", a list of levels or of pairs", codebook))?;
    if format != Format::Pair {
        return Err(Error::value("codebook", format!("levels for format \"{}\"", format.name()), "pairs").into());
    }
    Ok(Codebook::pairs(&words)?)
}

fn parse_permutations(permutation: Option<&Bound<PyAny>>, head_dim: usize) -> PyResult<Vec<Permutation>> {
    let Some(permutation) = permutation else { return Ok(Vec::new()) };
    let lists: Vec<Vec<usize>> = match permutation.extract::<Vec<usize>>() {
        Ok(one) => vec![one],
        Err(_) => permutation
            .extract()
            .map_err(|_| Error::value("permutation", "a list of channels, or one for each head", permutation))?,
    };
    Ok(lists.iter().map(|order| Permutation::new(order, head_dim)).collect::<Result<_>>()?)
}

fn parse_source(
    head_dim: usize,
    block: Option<BlockRule>,
    shift: Option<&Bound<PyAny>>,
    scale: Option<&Bound<PyAny>>,
) -> Result<Source> {
    let matrix = |tensor: Option<&Bound<PyAny>>, name: &'static str| match tensor {
        None => Ok(None),
        Some(tensor) => {
            let (data, [heads, width]) = ImportedTensor::new(tensor, name)?.matrix_f32()?;
            if width != head_dim || heads == 0 {
                return Err(Error::shape(name, format!("[heads, {head_dim}]"), &[heads as i64, width as i64]));
            }
            Ok(Some(data.chunks_exact(head_dim).map(<[f32]>::to_vec).collect::<Vec<_>>()))
        }
    };
    let (shift, scale) = (matrix(shift, "shift")?, matrix(scale, "scale")?);
    if let Some(rule) = block {
        if shift.is_some() || scale.is_some() {
            return Err(Error::value("block", "0 where shift or scale is given", rule.rows));
        }
        return Ok(Source::Block(rule));
    }
    let heads = shift.as_ref().or(scale.as_ref()).map_or(1, Vec::len);
    let shift = shift.unwrap_or_else(|| vec![vec![0.0; head_dim]; heads]);
    let scale = scale.unwrap_or_else(|| vec![vec![1.0; head_dim]; heads]);
    if shift.len() != scale.len() {
        return Err(Error::value("scale", format!("{} heads as shift has", shift.len()), scale.len()));
    }
    Ok(Source::Static(shift.into_iter().zip(scale).map(|(shift, scale)| Affine::new(shift, scale)).collect()))
}

#[pymethods]
impl PyCodec {
    #[new]
    #[pyo3(signature = (*, head_dim, format, group_size=None, metadata="e4m3", symmetric=true, codebook=None, rule="norm",
        clip=1.0, refinements=0, rotation="hadamard", permutation=None, block=0, block_shift=true, scale_exponent=1.0,
        shift=None, scale=None))]
    #[allow(clippy::too_many_arguments, clippy::fn_params_excessive_bools)]
    fn new(
        head_dim: usize,
        format: &str,
        group_size: Option<usize>,
        metadata: &str,
        symmetric: bool,
        codebook: Option<Bound<PyAny>>,
        rule: &str,
        clip: f32,
        refinements: u32,
        rotation: &str,
        permutation: Option<Bound<PyAny>>,
        block: usize,
        block_shift: bool,
        scale_exponent: f32,
        shift: Option<Bound<PyAny>>,
        scale: Option<Bound<PyAny>>,
    ) -> PyResult<Self> {
        let format = Format::from_name(format, Dtype::F32)?;
        let default_group = if head_dim.is_multiple_of(128) { 128 } else { head_dim };
        let layout = RowLayout::new(
            format,
            head_dim,
            group_size.unwrap_or(default_group),
            Metadata::from_name(metadata)?,
            symmetric,
        )?;
        let codebook = match codebook {
            Some(codebook) => parse_codebook(&codebook, format)?,
            None => Codebook::named(if format == Format::Int8 { "uniform" } else { "lloyd-max" }, format)?,
        };
        let block = if block == 0 { None } else { Some(BlockRule::new(block, block_shift, scale_exponent)?) };
        let permutations = parse_permutations(permutation.as_ref(), head_dim)?;
        let source = parse_source(head_dim, block, shift.as_ref(), scale.as_ref())?;
        let heads = match &source {
            Source::Static(affines) => affines.len().max(permutations.len()),
            Source::Block(_) => permutations.len(),
        };
        let codec = codec::Codec {
            layout,
            codebook,
            rule: Rule::from_name(rule)?,
            clip,
            refinements,
            rotation: Rotation::from_name(rotation)?,
            permutations,
            source,
        };
        codec.validate(heads)?;
        Ok(Self { codec })
    }

    /// Packs rows: float32 `[N, head_dim]` to uint8 `[N, row_bytes]`, each row's codes, then its metadata.
    #[pyo3(signature = (rows, head=0, statistics=None, isa=None))]
    fn encode(
        &self,
        py: Python,
        rows: &Bound<PyAny>,
        head: usize,
        statistics: Option<Statistics>,
        isa: Option<&str>,
    ) -> PyResult<OwnedTensor> {
        self.refuse_raw()?;
        let (data, count) = self.rows(rows)?;
        let affine = self.affine(head, statistics)?;
        let layout = self.codec.layout;
        let reference = isa == Some("reference");
        let isa = isa_named(isa.filter(|_| !reference))?;
        Ok(py.detach(|| {
            OwnedTensor::build(&[count, layout.row_bytes()], |bytes: &mut [u8]| {
                for (row, bytes) in data.chunks_exact(layout.head_dim).zip(bytes.chunks_exact_mut(layout.row_bytes())) {
                    let (codes, metadata) = bytes.split_at_mut(layout.code_bytes);
                    if reference {
                        self.codec.encode_row(row, &affine, head, codes, metadata);
                    } else {
                        cpu::encode_row(isa, &self.codec, &affine, head, row, codes, metadata);
                    }
                }
            })
        }))
    }

    /// The inverse of `encode`: uint8 `[N, row_bytes]` to float32 `[N, head_dim]`.
    #[pyo3(signature = (packed, head=0, statistics=None))]
    fn decode(
        &self,
        py: Python,
        packed: &Bound<PyAny>,
        head: usize,
        statistics: Option<Statistics>,
    ) -> PyResult<OwnedTensor> {
        self.refuse_raw()?;
        let (data, [count, width]) = ImportedTensor::new(packed, "packed")?.matrix_u8()?;
        let layout = self.codec.layout;
        if width != layout.row_bytes() {
            let expected = format!("[rows, {}]", layout.row_bytes());
            return Err(Error::shape("packed", expected, &[count as i64, width as i64]).into());
        }
        let affine = self.affine(head, statistics)?;
        Ok(py.detach(|| {
            OwnedTensor::build(&[count, layout.head_dim], |rows: &mut [f32]| {
                for (bytes, row) in data.chunks_exact(width).zip(rows.chunks_exact_mut(layout.head_dim)) {
                    let (codes, metadata) = bytes.split_at(layout.code_bytes);
                    self.codec.decode_row(codes, metadata, &affine, head, row);
                }
            })
        }))
    }

    /// Shift and scale (float32 `[head_dim]` each) that a block of these rows would get (FORMAT.md §4).
    fn block_statistics(&self, rows: &Bound<PyAny>) -> PyResult<(OwnedTensor, OwnedTensor)> {
        let Source::Block(rule) = &self.codec.source else {
            return Err(Error::value("block", "a codec with block statistics", 0).into());
        };
        let (data, _) = self.rows(rows)?;
        let width = self.codec.layout.head_dim;
        let affine = rule.statistics(&data, width).expand(width);
        let tensor = |values: &[f32]| OwnedTensor::build(&[width], |out: &mut [f32]| out.copy_from_slice(values));
        Ok((tensor(&affine.shift), tensor(&affine.scale)))
    }

    /// The codebook: levels, or pairs for format "1.5".
    fn levels<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        match &self.codec.codebook {
            Codebook::Uniform { levels } => {
                PyList::new(py, (0..*levels).map(|i| i as f32 - (*levels as f32 - 1.0) * 0.5))
            }
            Codebook::Levels { levels, .. } => PyList::new(py, levels),
            Codebook::Pairs { x, y, .. } => PyList::new(py, x.iter().zip(y).map(|(x, y)| (*x, *y))),
        }
    }

    #[getter]
    fn head_dim(&self) -> usize {
        self.codec.layout.head_dim
    }

    #[getter]
    fn group_size(&self) -> usize {
        self.codec.layout.group_size
    }

    #[getter]
    fn format(&self) -> &'static str {
        self.codec.layout.format.name()
    }

    #[getter]
    fn row_bytes(&self) -> usize {
        self.codec.layout.row_bytes()
    }

    #[getter]
    fn code_bytes(&self) -> usize {
        self.codec.layout.code_bytes
    }

    #[getter]
    fn metadata_bytes(&self) -> usize {
        self.codec.layout.metadata_bytes
    }

    /// Bits of an element in a full page: codes, metadata and block statistics.
    #[getter]
    fn bits_per_element(&self) -> f64 {
        self.codec.bits_per_element()
    }

    /// Rows of a block of statistics, 0 for static ones.
    #[getter]
    fn block(&self) -> usize {
        self.codec.block_rows()
    }

    fn __repr__(&self) -> String {
        let codec = &self.codec;
        format!(
            "Codec(head_dim={}, format=\"{}\", group_size={}, metadata=\"{}\", rule=\"{}\", rotation=\"{}\", block={}, bits_per_element={:.3})",
            codec.layout.head_dim,
            codec.layout.format.name(),
            codec.layout.group_size,
            codec.layout.metadata.name(),
            codec.rule.name(),
            codec.rotation.name(),
            codec.block_rows(),
            codec.bits_per_element(),
        )
    }
}

/// One attention layer's store: sinks | packed past | window for every (sequence, kv head).
#[pyclass(name = "Layer", module = "skvq._native")]
pub struct PyLayer {
    layer: layer::Layer,
}

/// A raw codec in the layer's own dtype; any other unchanged.
fn in_dtype(codec: &codec::Codec, dtype: Dtype) -> codec::Codec {
    let mut codec = codec.clone();
    if codec.is_raw() {
        codec.layout.format = Format::Raw(dtype);
        codec.layout.code_bytes = codec.layout.format.code_bytes(codec.layout.head_dim);
    }
    codec
}

#[pymethods]
impl PyLayer {
    #[new]
    #[pyo3(signature = (*, num_key_value_heads, keys, values, sinks, window, dtype, nonfinite="raise", isa=None))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        num_key_value_heads: usize,
        keys: &PyCodec,
        values: &PyCodec,
        sinks: usize,
        window: usize,
        dtype: &str,
        nonfinite: &str,
        isa: Option<&str>,
    ) -> PyResult<Self> {
        let dtype = Dtype::from_name(dtype)?;
        let spec = LayerSpec {
            num_key_value_heads,
            keys: in_dtype(&keys.codec, dtype),
            values: in_dtype(&values.codec, dtype),
            sinks,
            window,
            dtype,
            nonfinite: NonFinite::from_name(nonfinite)?,
            isa: isa_named(isa)?,
        };
        Ok(Self { layer: layer::Layer::new(spec)? })
    }

    /// Stores new tokens: keys `[B, Hkv, n, Dk]`, values `[B, Hkv, n, Dv]` in the layer's dtype. Nothing changes on an error.
    fn append(&mut self, py: Python, keys: &Bound<PyAny>, values: &Bound<PyAny>) -> PyResult<()> {
        let keys = ImportedTensor::new(keys, "keys")?;
        let values = ImportedTensor::new(values, "values")?;
        let (key_rows, value_rows) = (keys.view4()?, values.view4()?);
        py.detach(|| self.layer.append(key_rows, value_rows))?;
        Ok(())
    }

    /// Writes softmax(scale · q·kᵀ + mask) · v over all regions to `output` `[B, Hq, L, Dv]`; query `[B, Hq, L, Dk]`.
    #[pyo3(signature = (query, output, *, scale, mask=None, causal=false, softcap=None, sink_logits=None, fresh_keys=None, fresh_values=None))]
    #[allow(clippy::too_many_arguments)]
    fn attend(
        &self,
        py: Python,
        query: &Bound<PyAny>,
        output: &Bound<PyAny>,
        scale: f32,
        mask: Option<Bound<PyAny>>,
        causal: bool,
        softcap: Option<f32>,
        sink_logits: Option<Bound<PyAny>>,
        fresh_keys: Option<Bound<PyAny>>,
        fresh_values: Option<Bound<PyAny>>,
    ) -> PyResult<()> {
        let import =
            |tensor: Option<Bound<PyAny>>, name| tensor.map(|tensor| ImportedTensor::new(&tensor, name)).transpose();
        let query = ImportedTensor::new(query, "query")?;
        let mut output = ImportedTensor::new(output, "output")?;
        let mask = import(mask, "mask")?;
        let sink_logits = import(sink_logits, "sink_logits")?.map(|tensor| tensor.vec_f32()).transpose()?;
        let fresh_keys = import(fresh_keys, "fresh_keys")?;
        let fresh_values = import(fresh_values, "fresh_values")?;
        let fresh = match (&fresh_keys, &fresh_values) {
            (Some(keys), Some(values)) => Some((keys.view4()?, values.view4()?)),
            (None, None) => None,
            _ => return Err(Error::value("fresh_keys and fresh_values", "both or neither", "one of them").into()),
        };
        for input in [Some(&query), mask.as_ref(), fresh_keys.as_ref(), fresh_values.as_ref()].into_iter().flatten() {
            output.expect_disjoint(input)?;
        }
        let call = Attention {
            query: query.view4()?,
            scale,
            mask: mask.as_ref().map(ImportedTensor::mask4).transpose()?,
            causal,
            softcap,
            sink_logits: sink_logits.as_deref(),
            fresh,
        };
        let output = output.view_mut4()?;
        if output.dtype() != call.query.dtype() {
            return Err(Error::dtype("output", call.query.dtype().name(), output.dtype().name()).into());
        }
        py.detach(|| attend(&self.layer, &call, output))?;
        Ok(())
    }

    /// Writes all keys, decoded, to `output` `[B, Hkv, T, Dk]` in the layer's dtype.
    fn decode_keys(&self, py: Python, output: &Bound<PyAny>) -> PyResult<()> {
        self.decode(py, output, false)
    }

    /// Writes all values, decoded, to `output` `[B, Hkv, T, Dv]` in the layer's dtype.
    fn decode_values(&self, py: Python, output: &Bound<PyAny>) -> PyResult<()> {
        self.decode(py, output, true)
    }

    /// Tokens of padding in front of each sequence of the batch that the first append will bring.
    fn set_padding(&mut self, padding: Vec<usize>) -> PyResult<()> {
        Ok(self.layer.set_padding(padding)?)
    }

    /// Forgets the tokens from `length` on; rows that were packed stay packed.
    fn crop(&mut self, length: usize) -> PyResult<()> {
        Ok(self.layer.crop(length)?)
    }

    /// New row i of the batch is the old row indices[i]; nothing is copied until it is written.
    fn gather(&mut self, indices: Vec<usize>) -> PyResult<()> {
        Ok(self.layer.gather(&indices)?)
    }

    fn reset(&mut self) {
        self.layer.reset();
    }

    /// An independent layer that shares all pages until one of them is written.
    #[pyo3(name = "clone")]
    fn duplicate(&self) -> Self {
        Self { layer: self.layer.clone() }
    }

    #[getter]
    fn length(&self) -> usize {
        self.layer.regions().total()
    }

    #[getter]
    fn batch_size(&self) -> usize {
        self.layer.batch_size()
    }

    #[getter]
    fn num_key_value_heads(&self) -> usize {
        self.layer.spec().num_key_value_heads
    }

    /// Bytes of everything held; what sequences share counts once.
    #[getter]
    fn nbytes(&self) -> usize {
        self.layer.nbytes()
    }

    #[getter]
    fn bits_per_element(&self) -> f64 {
        self.layer.bits_per_element()
    }

    #[getter]
    fn sink_tokens(&self) -> usize {
        self.layer.regions().sinks
    }

    #[getter]
    fn packed_tokens(&self) -> usize {
        self.layer.regions().packed
    }

    /// Tokens in full precision at the end: the window, and rows that wait for the last row of their block.
    #[getter]
    fn window_tokens(&self) -> usize {
        self.layer.regions().window
    }

    #[getter]
    fn isa(&self) -> &'static str {
        self.layer.spec().isa.name()
    }

    fn __repr__(&self) -> String {
        let regions = self.layer.regions();
        format!(
            "Layer(batch_size={}, num_key_value_heads={}, tokens={} sinks + {} packed + {} window, nbytes={})",
            self.layer.batch_size(),
            self.layer.spec().num_key_value_heads,
            regions.sinks,
            regions.packed,
            regions.window,
            self.layer.nbytes(),
        )
    }
}

impl PyLayer {
    fn decode(&self, py: Python, output: &Bound<PyAny>, values: bool) -> PyResult<()> {
        let mut output = ImportedTensor::new(output, "output")?;
        let output = output.view_mut4()?;
        py.detach(|| self.layer.decode(values, output))?;
        Ok(())
    }
}

/// Instruction sets of this processor that skvq has code for, best first.
#[pyfunction]
fn available_isas() -> Vec<&'static str> {
    Isa::available().into_iter().map(Isa::name).collect()
}

/// Threads that share the work of one call.
#[pyfunction]
fn num_threads() -> usize {
    threads::num_threads()
}

/// Sets `num_threads`; at least 1.
#[pyfunction]
fn set_num_threads(n: usize) -> PyResult<()> {
    Ok(threads::set_num_threads(n)?)
}

#[pymodule]
pub mod _native {
    use pyo3::prelude::*;

    #[pymodule_export]
    use super::{PyCodec, PyLayer, SkvqError, available_isas, num_threads, set_num_threads};
    #[pymodule_export]
    use crate::dlpack::OwnedTensor;

    #[allow(non_upper_case_globals)]
    #[pymodule_export]
    const __version__: &str = env!("CARGO_PKG_VERSION");

    /// Probes of the `DLPack` exchange, for the tests.
    #[pymodule]
    mod testing {
        #[pymodule_export]
        use crate::dlpack::testing::{drop_elsewhere, fill, inspect, live_buffers, make_tensor, sum_f64, sum_mask};
    }
}

//! The Python class `Codec`: takes arguments, lets go of the interpreter. No algorithm lives here.

use std::sync::Arc;

use half::f16;
use pyo3::prelude::*;
use pyo3::types::PyList;

use super::isa_named;
use crate::backend::cpu;
use crate::codebook::Codebook;
use crate::codec::{Codec, Rule};
use crate::dlpack::{ImportedTensor, OwnedTensor};
use crate::error::{Error, Result};
use crate::format::{Format, Metadata, RowLayout};
use crate::parts::{PartLevels, parts_of_row};
use crate::tensor::Dtype;
use crate::transform::{Affine, BlockRule, Matrix, Permutation, Rotation, Source, TurningMean, Turns, spans_of};

/// Shift and scale of one head, as Python hands them over: two float32 vectors.
type Statistics<'py> = (Bound<'py, PyAny>, Bound<'py, PyAny>);

/// How the rows of one stream (the keys or the values of a layer) are packed. Immutable.
#[pyclass(frozen, name = "Codec", module = "skvq._native")]
pub struct PyCodec {
    /// `raw` formats get their dtype from the layer.
    pub(super) codec: Codec,
}

/// The means of neighbouring rows, for a codec whose mean turns.
struct Means<'a> {
    turning: Option<(&'a TurningMean, Arc<Vec<f32>>)>,
    position: i64,
}

impl<'a> Means<'a> {
    fn of(codec: &'a Codec, head: usize, position: i64, count: usize) -> Self {
        let turning = codec.turning_mean(head).map(|mean| (mean, mean.turns.spans(spans_of(position, count))));
        Self { turning, position }
    }

    fn write(&self, row: usize, affine: &mut Affine) {
        if let Some((mean, spans)) = &self.turning {
            mean.at(spans, self.position + row as i64, &mut affine.shift);
        }
    }
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
            Source::Turning(means) => match self.codec.turning_mean(head) {
                Some(_) => Ok(Affine::identity(head_dim)),
                None => Err(Error::value("head", format!("a head of the plan, 0..{}", means.len()), head)),
            },
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

/// A float32 tensor `[heads, width]`, head by head.
fn parse_heads(tensor: &Bound<PyAny>, name: &'static str, width: usize) -> Result<Vec<Vec<f32>>> {
    let (data, [heads, found]) = ImportedTensor::new(tensor, name)?.matrix_f32()?;
    if found != width || heads == 0 {
        return Err(Error::shape(name, format!("[heads, {width}]"), &[heads as i64, found as i64]));
    }
    Ok(data.chunks_exact(width).map(<[f32]>::to_vec).collect())
}

fn parse_turning(
    head_dim: usize,
    shift: Option<&Bound<PyAny>>,
    shift_sine: Option<&Bound<PyAny>>,
    frequencies: Option<&Bound<PyAny>>,
) -> Result<Option<Source>> {
    let (shift, sine, frequencies) = match (shift, shift_sine, frequencies) {
        (_, None, None) => return Ok(None),
        (Some(shift), Some(sine), Some(frequencies)) => (shift, sine, frequencies),
        _ => return Err(Error::value("shift, shift_sine and frequencies", "all three or only shift", "some of them")),
    };
    let frequencies = ImportedTensor::new(frequencies, "frequencies")?.vec_f32()?;
    if frequencies.len() != head_dim {
        return Err(Error::shape("frequencies", format!("[{head_dim}]"), &[frequencies.len() as i64]));
    }
    let turns = Turns::shared(&frequencies)?;
    let (means, quarters) = (parse_heads(shift, "shift", head_dim)?, parse_heads(sine, "shift_sine", head_dim)?);
    if means.len() != quarters.len() {
        return Err(Error::value("shift_sine", format!("{} heads as shift has", means.len()), quarters.len()));
    }
    let head = |(mean, quarter)| TurningMean::new(mean, quarter, Arc::clone(&turns));
    Ok(Some(Source::Turning(means.into_iter().zip(quarters).map(head).collect::<Result<_>>()?)))
}

/// M and B, float32 `[heads·D, D]` each.
fn parse_matrices(
    head_dim: usize,
    matrix: Option<&Bound<PyAny>>,
    inverse: Option<&Bound<PyAny>>,
) -> Result<Vec<Matrix>> {
    let (matrix, inverse) = match (matrix, inverse) {
        (None, None) => return Ok(Vec::new()),
        (Some(matrix), Some(inverse)) => (matrix, inverse),
        _ => return Err(Error::value("matrix and inverse", "both or neither", "one of them")),
    };
    let read = |tensor, name| ImportedTensor::new(tensor, name)?.squares_f32(head_dim);
    let (matrix, inverse) = (read(matrix, "matrix")?, read(inverse, "inverse")?);
    if matrix.len() != inverse.len() {
        return Err(Error::value("inverse", format!("{} numbers as matrix has", matrix.len()), inverse.len()));
    }
    let size = head_dim * head_dim;
    matrix.chunks_exact(size).zip(inverse.chunks_exact(size)).map(|(m, b)| Matrix::new(m, b, head_dim)).collect()
}

#[pymethods]
impl PyCodec {
    #[new]
    #[pyo3(signature = (*, head_dim, format, group_size=None, metadata="e4m3", symmetric=true, codebook=None, rule="norm",
        clip=1.0, refinements=0, unbiased=false, rotation=None, permutation=None, block=0, block_shift=true, scale_exponent=1.0, query_exponent=0.0,
        shift=None, scale=None, parts=None, matrix=None, inverse=None, shift_sine=None, frequencies=None, noise=None))]
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
        unbiased: bool,
        rotation: Option<&str>,
        permutation: Option<Bound<PyAny>>,
        block: usize,
        block_shift: bool,
        scale_exponent: f32,
        query_exponent: f32,
        shift: Option<Bound<PyAny>>,
        scale: Option<Bound<PyAny>>,
        parts: Option<Vec<(usize, usize)>>,
        matrix: Option<Bound<PyAny>>,
        inverse: Option<Bound<PyAny>>,
        shift_sine: Option<Bound<PyAny>>,
        frequencies: Option<Bound<PyAny>>,
        noise: Option<Bound<PyAny>>,
    ) -> PyResult<Self> {
        let precision = Metadata::from_name(metadata)?;
        let (layout, codebook, parts) = if format == "parts" || parts.is_some() {
            if format != "parts" || group_size.is_some_and(|size| size != head_dim) || !symmetric {
                let expected = "format \"parts\" and one symmetric group with parts";
                return Err(Error::value("parts", expected, format!("format \"{format}\" or another of them")).into());
            }
            let missing = || Error::value("parts", "a list of (bits, width) for format \"parts\"", "None");
            let levels = match codebook {
                None => PartLevels::LloydMax,
                Some(name) => match name.extract::<String>() {
                    Ok(name) => PartLevels::from_name(&name)?,
                    Err(_) => return Err(Error::value("codebook", "a name with parts", name).into()),
                },
            };
            let (layout, parts) = parts_of_row(head_dim, precision, &parts.ok_or_else(missing)?, levels)?;
            (layout, Codebook::named("lloyd-max", Format::Parts)?, parts)
        } else {
            let format = Format::from_name(format, Dtype::F32)?;
            let default_group = if head_dim.is_multiple_of(128) { 128 } else { head_dim };
            let layout = RowLayout::new(format, head_dim, group_size.unwrap_or(default_group), precision, symmetric)?;
            let codebook = match codebook {
                Some(codebook) => parse_codebook(&codebook, format)?,
                None if matches!(format, Format::Int8 | Format::Int2) => Codebook::named("uniform", format)?,
                None => Codebook::named("lloyd-max", format)?,
            };
            (layout, codebook, Vec::new())
        };
        let rotation = rotation.unwrap_or(if layout.format == Format::Parts { "identity" } else { "hadamard" });
        let block =
            if block == 0 { None } else { Some(BlockRule::new(block, block_shift, scale_exponent, query_exponent)?) };
        let permutations = parse_permutations(permutation.as_ref(), head_dim)?;
        let turning = parse_turning(head_dim, shift.as_ref(), shift_sine.as_ref(), frequencies.as_ref())?;
        let source = match turning {
            Some(_) if block.is_some() || scale.is_some() => {
                return Err(Error::value("shift_sine", "no block and no scale beside it", "one").into());
            }
            Some(turning) => turning,
            None => parse_source(head_dim, block, shift.as_ref(), scale.as_ref())?,
        };
        let matrices = parse_matrices(head_dim, matrix.as_ref(), inverse.as_ref())?;
        let noise = noise.map_or(Ok(Vec::new()), |noise| ImportedTensor::new(&noise, "noise")?.vec_f32())?;
        let heads = match &source {
            Source::Static(affines) => affines.len(),
            Source::Turning(means) => means.len(),
            Source::Block(_) => 0,
        };
        let heads = heads.max(permutations.len()).max(matrices.len());
        let codec = Codec {
            layout,
            codebook,
            parts,
            rule: Rule::from_name(rule)?,
            clip,
            refinements,
            unbiased,
            rotation: Rotation::from_name(rotation)?,
            permutations,
            source,
            matrices,
            noise,
        };
        codec.validate(heads)?;
        Ok(Self { codec })
    }

    /// Packs rows: float32 `[N, head_dim]` to uint8 `[N, row_bytes]`, each row's codes, then its metadata.
    /// Row i is at `position` + i.
    #[pyo3(signature = (rows, head=0, statistics=None, isa=None, position=0))]
    fn encode(
        &self,
        py: Python,
        rows: &Bound<PyAny>,
        head: usize,
        statistics: Option<Statistics>,
        isa: Option<&str>,
        position: i64,
    ) -> PyResult<OwnedTensor> {
        self.refuse_raw()?;
        let (data, count) = self.rows(rows)?;
        let mut affine = self.affine(head, statistics)?;
        let layout = self.codec.layout;
        let mean = Means::of(&self.codec, head, position, count);
        let reference = isa == Some("reference");
        let isa = isa_named(isa.filter(|_| !reference))?;
        Ok(py.detach(|| {
            OwnedTensor::build(&[count, layout.row_bytes()], |bytes: &mut [u8]| {
                let rows = data.chunks_exact(layout.head_dim).zip(bytes.chunks_exact_mut(layout.row_bytes()));
                for (i, (row, bytes)) in rows.enumerate() {
                    mean.write(i, &mut affine);
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
    #[pyo3(signature = (packed, head=0, statistics=None, position=0))]
    fn decode(
        &self,
        py: Python,
        packed: &Bound<PyAny>,
        head: usize,
        statistics: Option<Statistics>,
        position: i64,
    ) -> PyResult<OwnedTensor> {
        self.refuse_raw()?;
        let (data, [count, width]) = ImportedTensor::new(packed, "packed")?.matrix_u8()?;
        let layout = self.codec.layout;
        if width != layout.row_bytes() {
            let expected = format!("[rows, {}]", layout.row_bytes());
            return Err(Error::shape("packed", expected, &[count as i64, width as i64]).into());
        }
        let mut affine = self.affine(head, statistics)?;
        let mean = Means::of(&self.codec, head, position, count);
        Ok(py.detach(|| {
            OwnedTensor::build(&[count, layout.head_dim], |rows: &mut [f32]| {
                let rows = data.chunks_exact(width).zip(rows.chunks_exact_mut(layout.head_dim));
                for (i, (bytes, row)) in rows.enumerate() {
                    mean.write(i, &mut affine);
                    let (codes, metadata) = bytes.split_at(layout.code_bytes);
                    self.codec.decode_row(codes, metadata, &affine, head, row);
                }
            })
        }))
    }

    /// Shift and scale (float32 `[head_dim]` each) that a block of these rows would get (FORMAT.md §4), with `factors` of the queries
    /// on the scales.
    #[pyo3(signature = (rows, factors=None))]
    fn block_statistics(
        &self,
        rows: &Bound<PyAny>,
        factors: Option<Bound<PyAny>>,
    ) -> PyResult<(OwnedTensor, OwnedTensor)> {
        let Source::Block(rule) = &self.codec.source else {
            return Err(Error::value("block", "a codec with block statistics", 0).into());
        };
        let (data, _) = self.rows(rows)?;
        let width = self.codec.layout.head_dim;
        let factors = factors.map(|factors| ImportedTensor::new(&factors, "factors")?.vec_f32()).transpose()?;
        let factors: Option<Vec<f16>> = factors.map(|factors| factors.into_iter().map(f16::from_f32).collect());
        if let Some(factors) = factors.as_ref().filter(|factors| factors.len() != width) {
            return Err(Error::value("factors", format!("{width} channels"), factors.len()).into());
        }
        let affine = rule.statistics(&data, width, factors.as_deref()).expand(width);
        let tensor = |values: &[f32]| OwnedTensor::build(&[width], |out: &mut [f32]| out.copy_from_slice(values));
        Ok((tensor(&affine.shift), tensor(&affine.scale)))
    }

    /// The codebook: levels, or pairs for format "1.5".
    fn levels<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        if self.codec.is_of_parts() {
            let reason = "the parts of a row have codebooks of their own".to_string();
            return Err(Error::Unsupported { name: "levels".into(), reason }.into());
        }
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

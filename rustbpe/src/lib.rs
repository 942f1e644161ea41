//! Byte-level BPE for Python: `train` learns the merges, `Encoder` applies them. Beside it BM25, and what decoding on a
//! CPU needs: the selective scan, products of few rows, the attention of one query.
//!
//! The modules below are plain Rust. This file is the Python skin: it converts, lets go of the interpreter while the
//! core works, and turns an [`Error`] into a `ValueError`. Signatures and their meaning are in `rustbpe.pyi`.
#![deny(unsafe_code)] // except where a line below allows it

#[allow(unsafe_code)] // vector instructions, arrays that threads fill together
pub mod attend;
pub mod bm25;
#[cfg(feature = "python")]
mod bm25_skin;
pub mod count;
#[cfg(feature = "python")]
mod decode_skin;
pub mod encode;
pub mod lanes;
#[allow(unsafe_code)] // as above
pub mod linear;
#[allow(unsafe_code)] // as above
pub mod norm;
#[allow(unsafe_code)] // as above
pub mod scan;
#[cfg(feature = "python")]
mod scan_skin;
pub mod split;
pub mod stem;
pub mod table;
pub mod terms;
pub mod train;
pub mod unicode;

/// What was wrong with the input, and what to pass instead.
#[derive(Debug)]
pub struct Error(pub String);

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Error {}

pub type Result<T> = std::result::Result<T, Error>;

#[cfg(feature = "python")]
#[allow(unsafe_code)] // UTF-8 that Python has checked; what PyO3's macros write
#[pyo3::pymodule(name = "rustbpe")]
mod python {
    use numpy::IntoPyArray;
    use pyo3::exceptions::{PyTypeError, PyValueError};
    use pyo3::intern;
    use pyo3::prelude::*;
    use pyo3::pybacked::{PyBackedBytes, PyBackedStr};
    use pyo3::types::{PyBytes, PyIterator, PyList, PyString};

    use crate::count::Counter;
    use crate::encode::{self, Batch};
    use crate::split::Splitter;
    use crate::train::Tie;

    #[pymodule_export]
    use crate::bm25_skin::{Bm25, bm25_build, terms};

    #[pymodule_export]
    use crate::decode_skin::{PackedLinear, attend_one, rms_norm};

    #[pymodule_export]
    use crate::scan_skin::{selective_scan_backward, selective_scan_forward, selective_state_update, simd_level};

    #[pymodule_export]
    const DEFAULT_PATTERN: &str = crate::split::DEFAULT_PATTERN;

    /// Bytes of text that are taken from Python at a time, a thread.
    pub(crate) const GROUP: usize = 1 << 22;

    impl From<crate::Error> for PyErr {
        fn from(error: crate::Error) -> PyErr {
            PyValueError::new_err(error.0)
        }
    }

    /// UTF-8 of a `str`, usable while other threads run Python. ASCII is borrowed; the rest is encoded to `bytes` and
    /// dropped after use, because asking a `str` for its UTF-8 would keep a second copy in it as long as it lives.
    pub(crate) enum Text {
        Ascii(PyBackedStr),
        Utf8(PyBackedBytes),
    }

    impl Text {
        pub(crate) fn new(object: &Bound<'_, PyAny>) -> PyResult<Text> {
            let py = object.py();
            let Ok(text) = object.cast::<PyString>() else {
                return Err(PyTypeError::new_err(format!("a text must be str, not {}", object.get_type().name()?)));
            };
            if text.call_method0(intern!(py, "isascii"))?.is_truthy()? {
                return Ok(Text::Ascii(text.clone().try_into()?));
            }
            match text.encode_utf8() {
                Ok(bytes) => Ok(Text::Utf8(bytes.into())),
                Err(e) => Err(PyValueError::new_err(format!(
                    "a text cannot be encoded ({e}); replace lone surrogates first: \
                     text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')"
                ))),
            }
        }

        /// The next texts, of more than `bytes` bytes together unless they are the last; None after them.
        pub(crate) fn group(texts: &mut Bound<'_, PyIterator>, bytes: usize) -> PyResult<Option<Vec<Text>>> {
            let (mut group, mut size) = (Vec::new(), 0);
            while size <= bytes
                && let Some(text) = texts.next()
            {
                let text = Text::new(&text?)?;
                size += text.as_str().len();
                group.push(text);
            }
            Ok((!group.is_empty()).then_some(group))
        }

        pub(crate) fn as_str(&self) -> &str {
            match self {
                Text::Ascii(text) => text,
                // SAFETY: Python's own UTF-8 encoder made these bytes from a `str`, and a `bytes` object does not change.
                Text::Utf8(bytes) => unsafe { std::str::from_utf8_unchecked(bytes) },
            }
        }
    }

    #[pyfunction]
    #[pyo3(signature = (texts, vocab_size, pattern = DEFAULT_PATTERN, threads = None, tie = "smaller_ids", buffer = 1 << 22))]
    fn train<'py>(
        py: Python<'py>,
        texts: &Bound<'py, PyAny>,
        vocab_size: i64,
        pattern: &str,
        threads: Option<usize>,
        tie: &str,
        buffer: usize,
    ) -> PyResult<Vec<(Bound<'py, PyBytes>, usize)>> {
        if texts.is_instance_of::<PyString>() {
            return Err(PyTypeError::new_err("texts is one str: pass a list or an iterator of str"));
        }
        let tie = match tie {
            "smaller_ids" => Tie::SmallerIds,
            "greater_bytes" => Tie::GreaterBytes,
            _ => return Err(PyValueError::new_err(format!("tie={tie:?}: pass 'smaller_ids' or 'greater_bytes'"))),
        };
        let vocab_size = usize::try_from(vocab_size).unwrap_or(0);
        crate::train::check_vocab_size(vocab_size)?; // before the texts are read
        let threads = threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, |n| n.get())).min(256);
        let splitter = Splitter::new(pattern)?;
        let mut counter = Counter::new(&splitter, threads);
        let mut texts = texts.try_iter()?;
        while let Some(group) = Text::group(&mut texts, buffer)? {
            let group: Vec<&str> = group.iter().map(Text::as_str).collect();
            py.detach(|| counter.add(&group))?;
        }
        let tokens = py.detach(|| crate::train::train(counter.finish(), vocab_size, tie))?;
        Ok(tokens.iter().enumerate().map(|(rank, token)| (PyBytes::new(py, token), rank)).collect())
    }

    #[pyfunction]
    fn splitter(pattern: &str) -> PyResult<&'static str> {
        Ok(Splitter::new(pattern)?.kind())
    }

    #[pyfunction]
    #[pyo3(signature = (text, pattern = DEFAULT_PATTERN))]
    fn split<'py>(text: &Bound<'py, PyAny>, pattern: &str) -> PyResult<Vec<Bound<'py, PyString>>> {
        let (py, text) = (text.py(), Text::new(text)?);
        let (text, mut pieces) = (text.as_str(), Vec::new());
        Splitter::new(pattern)?.for_each(text, |start, end| pieces.push(PyString::new(py, &text[start..end])))?;
        Ok(pieces)
    }

    #[pyclass(frozen, module = "rustbpe")]
    struct Encoder(encode::Encoder);

    #[pymethods]
    impl Encoder {
        #[new]
        #[pyo3(signature = (mergeable_ranks, pattern = DEFAULT_PATTERN))]
        fn new(mergeable_ranks: Vec<(Vec<u8>, u32)>, pattern: &str) -> PyResult<Self> {
            Ok(Encoder(encode::Encoder::new(&mergeable_ranks, Splitter::new(pattern)?)?))
        }

        fn encode(&self, py: Python<'_>, text: &Bound<'_, PyAny>) -> PyResult<Vec<u32>> {
            let text = Text::new(text)?;
            Ok(py.detach(|| self.0.encode(text.as_str()))?)
        }

        #[pyo3(signature = (texts, threads = 1))]
        fn encode_batch<'py>(
            &self,
            texts: &Bound<'py, PyList>,
            threads: usize,
        ) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyAny>)> {
            if self.0.max_id() < 1 << 16 {
                self.arrays::<u16>(texts, threads)
            } else {
                self.arrays::<u32>(texts, threads)
            }
        }
    }

    impl Encoder {
        fn arrays<'py, T: encode::Id + numpy::Element>(
            &self,
            texts: &Bound<'py, PyList>,
            threads: usize,
        ) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyAny>)> {
            let (py, mut batch) = (texts.py(), Batch::<T>::default());
            let mut texts = texts.try_iter()?;
            while let Some(group) = Text::group(&mut texts, GROUP.saturating_mul(threads))? {
                let group: Vec<&str> = group.iter().map(Text::as_str).collect();
                py.detach(|| self.0.extend(&mut batch, &group, threads))?;
            }
            Ok((batch.ids.into_pyarray(py).into_any(), batch.offsets.into_pyarray(py).into_any()))
        }
    }
}

//! The Python skin of [`crate::bm25`] and [`crate::terms`].

use std::path::PathBuf;

use numpy::{IntoPyArray, PyArray1, PyArray2, PyReadonlyArray1};
use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyList;

use crate::bm25::{Bm25 as Core, Builder, Scheme, Variant};
use crate::python::{GROUP, Text};
use crate::terms::Rules;

#[pyfunction]
pub fn terms(texts: &Bound<'_, PyList>, stem: bool, stop_words: bool) -> PyResult<Vec<Vec<String>>> {
    let rules = Rules { stem, stop_words };
    texts.iter().map(|text| Ok(rules.terms(Text::new(&text)?.as_str()))).collect()
}

/// An OSError with number and file, as Python's own functions raise it.
fn os_error(path: &std::path::Path, error: std::io::Error) -> PyErr {
    let message = error.to_string();
    match error.raw_os_error() {
        Some(number) => {
            let message = message.split(" (os error").next().unwrap_or_default().to_string();
            PyOSError::new_err((number, message, path.to_owned()))
        }
        None => PyOSError::new_err(message),
    }
}

#[pyfunction]
#[pyo3(signature = (texts, path, stem, stop_words, threads = 1))]
pub fn bm25_build(
    py: Python<'_>,
    texts: &Bound<'_, PyAny>,
    path: PathBuf,
    stem: bool,
    stop_words: bool,
    threads: usize,
) -> PyResult<(u64, u64, u64, u64)> {
    let mut texts = texts.try_iter()?;
    let threads = threads.clamp(1, 256);
    let mut builder = Builder::new(&path, Rules { stem, stop_words }, threads).map_err(|e| os_error(&path, e))?;
    while let Some(group) = Text::group(&mut texts, GROUP * threads)? {
        let group: Vec<&str> = group.iter().map(Text::as_str).collect();
        py.detach(|| builder.add(&group)).map_err(|e| os_error(&path, e))?;
    }
    let counts = py.detach(|| builder.finish()).map_err(|e| os_error(&path, e))?;
    Ok((counts.texts, counts.terms, counts.length, counts.postings))
}

#[pyclass(frozen, module = "rustbpe")]
pub struct Bm25(Core);

#[pymethods]
impl Bm25 {
    #[new]
    #[pyo3(signature = (paths, variant = "lucene", k1 = 1.5, b = 0.75))]
    fn new(py: Python<'_>, paths: Vec<PathBuf>, variant: &str, k1: f64, b: f64) -> PyResult<Self> {
        let scheme = Scheme { variant: Variant::parse(variant)?, k1, b };
        Ok(Bm25(py.detach(|| Core::open(&paths, scheme))?))
    }

    fn __len__(&self) -> usize {
        self.0.len()
    }

    #[getter]
    fn rules(&self) -> Option<(bool, bool)> {
        self.0.rules().map(|rules| (rules.stem, rules.stop_words))
    }

    #[pyo3(signature = (queries, k, allowed = None, threads = 1))]
    #[allow(clippy::type_complexity)]
    fn search<'py>(
        &self,
        queries: &Bound<'py, PyList>,
        k: usize,
        allowed: Option<PyReadonlyArray1<'py, bool>>,
        threads: usize,
    ) -> PyResult<(Bound<'py, PyArray2<i64>>, Bound<'py, PyArray2<f32>>)> {
        let py = queries.py();
        let texts = queries.iter().map(|query| Text::new(&query)).collect::<PyResult<Vec<_>>>()?;
        let texts: Vec<&str> = texts.iter().map(Text::as_str).collect();
        let allowed = match &allowed {
            Some(allowed) => Some(allowed.as_slice().map_err(|_| PyValueError::new_err("allowed is not contiguous"))?),
            None => None,
        };
        let k = k.min(self.0.len());
        let (ids, scores) = py.detach(|| {
            let answers = self.0.search(&texts, k, allowed, threads)?;
            let shape = (texts.len(), k);
            let (mut ids, mut scores) = (vec![-1; shape.0 * k], vec![f32::NEG_INFINITY; shape.0 * k]);
            for (i, hits) in answers.iter().enumerate() {
                for (j, &(id, score)) in hits.iter().enumerate() {
                    (ids[i * k + j], scores[i * k + j]) = (id as i64, score);
                }
            }
            Ok::<_, crate::Error>((ids, scores))
        })?;
        let shape = [texts.len(), k];
        Ok((reshape(ids.into_pyarray(py), shape)?, reshape(scores.into_pyarray(py), shape)?))
    }

    fn scores<'py>(&self, query: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyArray1<f32>>> {
        let (py, query) = (query.py(), Text::new(query)?);
        let query = query.as_str();
        Ok(py.detach(|| self.0.scores(query))?.into_pyarray(py))
    }
}

fn reshape<'py, T: numpy::Element>(
    flat: Bound<'py, PyArray1<T>>,
    shape: [usize; 2],
) -> PyResult<Bound<'py, PyArray2<T>>> {
    use numpy::PyArrayMethods;
    flat.reshape(shape)
}

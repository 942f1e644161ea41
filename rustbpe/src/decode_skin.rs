//! The Python skin of [`crate::linear`], [`crate::attend`] and [`crate::norm`].

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::attend::{self, Attend, Kept};
use crate::linear::Packed;
use crate::norm::{self, Turn};
use crate::scan_skin::{Any, level, read, shaped, sizes};

/// Whether an array holds bits of bfloat16; what else is wrong with it is found where it is read.
fn is_half(array: &Any<'_>) -> PyResult<bool> {
    Ok(array.getattr("dtype")?.getattr("itemsize")?.extract::<usize>()? == 2)
}

/// A weight (N, K), packed.
#[pyclass(frozen, module = "rustbpe")]
pub struct PackedLinear(Packed);

#[pymethods]
impl PackedLinear {
    #[new]
    fn new(py: Python<'_>, weight: &Any<'_>) -> PyResult<PackedLinear> {
        let shape @ [_, inputs] = sizes("weight", weight)?;
        Ok(PackedLinear(if is_half(weight)? {
            let weight = read::<u16>("weight", weight, &shape)?;
            let weight = weight.as_slice().expect("checked");
            py.detach(|| Packed::half(weight, inputs))
        } else {
            let weight = read::<f32>("weight", weight, &shape)?;
            let weight = weight.as_slice().expect("checked");
            py.detach(|| Packed::float(weight, inputs))
        }))
    }

    #[getter]
    fn shape(&self) -> (usize, usize) {
        (self.0.outputs, self.0.inputs)
    }

    #[pyo3(signature = (x, *, threads = 1, simd = None))]
    fn __call__<'py>(
        &self,
        py: Python<'py>,
        x: &Any<'py>,
        threads: usize,
        simd: Option<&str>,
    ) -> PyResult<Option<Any<'py>>> {
        let level = level(simd)?;
        let [rows, _] = sizes("x", x)?;
        let x = read::<f32>("x", x, &[rows, self.0.inputs])?;
        let x = x.as_slice().expect("checked");
        let y = py.detach(|| self.0.multiply(x, threads, level));
        shaped(py, y, [rows, self.0.outputs])
    }
}

#[pyfunction]
#[pyo3(signature = (q, k, v, lengths, *, threads = 1, simd = None))]
pub fn attend_one<'py>(
    py: Python<'py>,
    q: &Any<'py>,
    k: &Any<'py>,
    v: &Any<'py>,
    lengths: &Any<'py>,
    threads: usize,
    simd: Option<&str>,
) -> PyResult<Option<Any<'py>>> {
    let level = level(simd)?;
    let [rows, heads, size] = sizes("q", q)?;
    let [_, groups, capacity, _] = sizes("k", k)?;
    let kept = [rows, groups, capacity, size];
    let q = read("q", q, &[rows, heads, size])?;
    let lengths = read::<i64>("lengths", lengths, &[rows])?;
    let (q, lengths) = (q.as_slice().expect("checked"), lengths.as_slice().expect("checked"));
    if heads % groups != 0 {
        return Err(PyValueError::new_err(format!("q has {heads} heads, k {groups}: expected a multiple")));
    }
    if let Some(wrong) = lengths.iter().find(|&&n| n < 1 || n as usize > capacity) {
        return Err(PyValueError::new_err(format!("lengths: {wrong}, expected 1 to {capacity}")));
    }
    let answer = |kept| {
        let a = Attend { heads, groups, capacity, size, q, kept, lengths };
        py.detach(|| attend::attend(&a, threads, level))
    };
    let y = if is_half(k)? {
        let (k, v) = (read::<u16>("k", k, &kept)?, read::<u16>("v", v, &kept)?);
        answer(Kept::Half(k.as_slice().expect("checked"), v.as_slice().expect("checked")))
    } else {
        let (k, v) = (read::<f32>("k", k, &kept)?, read::<f32>("v", v, &kept)?);
        answer(Kept::Float(k.as_slice().expect("checked"), v.as_slice().expect("checked")))
    };
    shaped(py, y, [rows, heads, size])
}

#[pyfunction]
#[pyo3(signature = (x, cos = None, sin = None, *, simd = None))]
pub fn rms_norm<'py>(
    py: Python<'py>,
    x: &Any<'py>,
    cos: Option<&Any<'py>>,
    sin: Option<&Any<'py>>,
    simd: Option<&str>,
) -> PyResult<Option<Any<'py>>> {
    let level = level(simd)?;
    let shape @ [tokens, heads, size] = sizes("x", x)?;
    let x = read::<f32>("x", x, &shape)?;
    let x = x.as_slice().expect("checked");
    let (Some(cos), Some(sin)) = (cos, sin) else {
        return shaped(py, norm::rms_norm(x, size, None, level), shape);
    };
    let [rows, half] = sizes("cos", cos)?;
    if 2 * half != size || tokens % rows != 0 {
        return Err(PyValueError::new_err(format!(
            "cos has shape ({rows}, {half}): expected (a divisor of {tokens}, {})",
            size / 2
        )));
    }
    let (cos, sin) = (read("cos", cos, &[rows, half])?, read("sin", sin, &[rows, half])?);
    let (cos, sin) = (cos.as_slice().expect("checked"), sin.as_slice().expect("checked"));
    shaped(py, norm::rms_norm(x, size, Some(Turn { heads, cos, sin }), level), shape)
}

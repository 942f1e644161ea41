//! The Python skin of [`crate::scan`]: numpy arrays in, numpy arrays out, the interpreter let go meanwhile.

use numpy::{Element, IntoPyArray, PyArray1, PyArrayDyn, PyArrayMethods, PyReadonlyArrayDyn, PyUntypedArrayMethods};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::lanes::Level;
use crate::scan::{self, Scan, Step};

pub(crate) type Any<'py> = Bound<'py, PyAny>;
pub(crate) type Array<'py, T = f32> = PyReadonlyArrayDyn<'py, T>;

/// `object` as an array of this type, C-contiguous, of this shape; a ValueError that names it if it is not.
fn array<'py, T: Element>(name: &str, object: &Any<'py>, shape: &[usize]) -> PyResult<Bound<'py, PyArrayDyn<T>>> {
    let wanted = || {
        let dtype = std::any::type_name::<T>().replace('f', "float").replace('i', "int").replace('u', "uint");
        format!("{name}: expected a C-contiguous {dtype} array of shape {shape:?}")
    };
    let Ok(array) = object.cast::<PyArrayDyn<T>>() else {
        let got = match object.getattr("dtype") {
            Ok(dtype) => dtype.str()?.to_string(),
            Err(_) => object.get_type().name()?.to_string(),
        };
        return Err(PyValueError::new_err(format!("{}, got {got}", wanted())));
    };
    if array.shape() != shape {
        return Err(PyValueError::new_err(format!("{}, got shape {:?}", wanted(), array.shape())));
    }
    if !array.is_c_contiguous() {
        return Err(PyValueError::new_err(format!("{}, got strides {:?} (bytes)", wanted(), array.strides())));
    }
    Ok(array.clone())
}

pub(crate) fn read<'py, T: Element>(name: &str, object: &Any<'py>, shape: &[usize]) -> PyResult<Array<'py, T>> {
    let array = array(name, object, shape)?;
    array.try_readonly().map_err(|_| PyValueError::new_err(format!("{name}: it is being written to")))
}

fn read_option<'py, T: Element>(
    name: &str,
    object: Option<&Any<'py>>,
    shape: &[usize],
) -> PyResult<Option<Array<'py, T>>> {
    object.map(|object| read(name, object, shape)).transpose()
}

fn slice<'a, T: Element>(array: &'a Option<Array<'_, T>>) -> Option<&'a [T]> {
    array.as_ref().map(|array| array.as_slice().expect("checked"))
}

/// The sizes of an array of D dimensions, none of them 0.
pub(crate) fn sizes<const D: usize>(name: &str, object: &Any<'_>) -> PyResult<[usize; D]> {
    let shape: Vec<usize> = object.getattr("shape").and_then(|shape| shape.extract()).unwrap_or_default();
    match <[usize; D]>::try_from(shape.as_slice()) {
        Ok(sizes) if !sizes.contains(&0) => Ok(sizes),
        _ => Err(PyValueError::new_err(format!("{name}: expected {D} dimensions, none empty, got shape {shape:?}"))),
    }
}

pub(crate) fn level(simd: Option<&str>) -> PyResult<Level> {
    Ok(simd.map_or_else(|| Ok(Level::best()), Level::parse)?)
}

/// None for an empty array, which stands for an argument that was not given.
fn array1(py: Python<'_>, values: Vec<f32>) -> Option<Bound<'_, PyArray1<f32>>> {
    (!values.is_empty()).then(|| values.into_pyarray(py))
}

pub(crate) fn shaped<'py, const D: usize>(
    py: Python<'py>,
    values: Vec<f32>,
    shape: [usize; D],
) -> PyResult<Option<Any<'py>>> {
    array1(py, values).map(|array| Ok(array.reshape(shape.to_vec())?.into_any())).transpose()
}

/// The arrays of a scan, held while the kernel reads them.
struct Arrays<'py> {
    sizes: [usize; 4], // B, T, E, N
    u: Array<'py>,
    delta: Array<'py>,
    a: Array<'py>,
    b: Array<'py>,
    c: Array<'py>,
    d: Option<Array<'py>>,
    z: Option<Array<'py>>,
    delta_bias: Option<Array<'py>>,
    softplus: bool,
    initial: Option<Array<'py>>,
    resets: Option<Array<'py, u8>>,
    lengths: Option<Array<'py, i64>>,
}

impl Arrays<'_> {
    fn scan(&self) -> Scan<'_> {
        let [batch, time, channels, states] = self.sizes;
        Scan {
            batch,
            time,
            channels,
            states,
            u: self.u.as_slice().expect("checked"),
            delta: self.delta.as_slice().expect("checked"),
            a: self.a.as_slice().expect("checked"),
            b: self.b.as_slice().expect("checked"),
            c: self.c.as_slice().expect("checked"),
            d: slice(&self.d),
            z: slice(&self.z),
            delta_bias: slice(&self.delta_bias),
            softplus: self.softplus,
            initial: slice(&self.initial),
            resets: slice(&self.resets),
            lengths: slice(&self.lengths),
        }
    }
}

impl<'py> Arrays<'py> {
    #[expect(clippy::too_many_arguments, reason = "as many as Python gives")]
    fn new(
        u: &Any<'py>,
        delta: &Any<'py>,
        a: &Any<'py>,
        b: &Any<'py>,
        c: &Any<'py>,
        d: Option<&Any<'py>>,
        z: Option<&Any<'py>>,
        delta_bias: Option<&Any<'py>>,
        softplus: bool,
        initial: Option<&Any<'py>>,
        resets: Option<&Any<'py>>,
        lengths: Option<&Any<'py>>,
    ) -> PyResult<Self> {
        let [batch, time, channels] = sizes("u", u)?;
        let [_, states] = sizes("a", a)?;
        let (bte, btn) = ([batch, time, channels], [batch, time, states]);
        Ok(Arrays {
            sizes: [batch, time, channels, states],
            u: read("u", u, &bte)?,
            delta: read("delta", delta, &bte)?,
            a: read("a", a, &[channels, states])?,
            b: read("b", b, &btn)?,
            c: read("c", c, &btn)?,
            d: read_option("d", d, &[channels])?,
            z: read_option("z", z, &bte)?,
            delta_bias: read_option("delta_bias", delta_bias, &[channels])?,
            softplus,
            initial: read_option("initial_state", initial, &[batch, channels, states])?,
            resets: read_option("resets", resets, &[batch, time])?,
            lengths: read_option("lengths", lengths, &[batch])?,
        })
    }
}

#[pyfunction]
pub fn simd_level() -> &'static str {
    Level::best().name()
}

#[pyfunction]
#[pyo3(signature = (u, delta, a, b, c, d = None, z = None, delta_bias = None, delta_softplus = false, *,
    initial_state = None, resets = None, lengths = None, keep = false, threads = 1, simd = None))]
#[expect(clippy::too_many_arguments, reason = "the interface of mamba_ssm")]
#[expect(clippy::type_complexity, reason = "a tuple in Python")]
pub fn selective_scan_forward<'py>(
    py: Python<'py>,
    u: &Any<'py>,
    delta: &Any<'py>,
    a: &Any<'py>,
    b: &Any<'py>,
    c: &Any<'py>,
    d: Option<&Any<'py>>,
    z: Option<&Any<'py>>,
    delta_bias: Option<&Any<'py>>,
    delta_softplus: bool,
    initial_state: Option<&Any<'py>>,
    resets: Option<&Any<'py>>,
    lengths: Option<&Any<'py>>,
    keep: bool,
    threads: usize,
    simd: Option<&str>,
) -> PyResult<(Option<Any<'py>>, Option<Any<'py>>, Option<Bound<'py, PyArray1<f32>>>)> {
    let level = level(simd)?;
    let arrays = Arrays::new(u, delta, a, b, c, d, z, delta_bias, delta_softplus, initial_state, resets, lengths)?;
    let (scan, [batch, time, channels, states]) = (arrays.scan(), arrays.sizes);
    let to = py.detach(|| scan::forward(&scan, keep, threads, level));
    let last = shaped(py, to.last, [batch, channels, states])?;
    Ok((shaped(py, to.out, [batch, time, channels])?, last, array1(py, to.borders)))
}

#[pyfunction]
#[pyo3(signature = (grad_out, grad_last, borders, u, delta, a, b, c, d = None, z = None, delta_bias = None,
    delta_softplus = false, *, initial_state = None, resets = None, lengths = None, threads = 1, simd = None))]
#[expect(clippy::too_many_arguments, reason = "the interface of mamba_ssm")]
pub fn selective_scan_backward<'py>(
    py: Python<'py>,
    grad_out: &Any<'py>,
    grad_last: Option<&Any<'py>>,
    borders: &Any<'py>,
    u: &Any<'py>,
    delta: &Any<'py>,
    a: &Any<'py>,
    b: &Any<'py>,
    c: &Any<'py>,
    d: Option<&Any<'py>>,
    z: Option<&Any<'py>>,
    delta_bias: Option<&Any<'py>>,
    delta_softplus: bool,
    initial_state: Option<&Any<'py>>,
    resets: Option<&Any<'py>>,
    lengths: Option<&Any<'py>>,
    threads: usize,
    simd: Option<&str>,
) -> PyResult<[Option<Any<'py>>; 9]> {
    let level = level(simd)?;
    let arrays = Arrays::new(u, delta, a, b, c, d, z, delta_bias, delta_softplus, initial_state, resets, lengths)?;
    let (scan, [batch, time, channels, states]) = (arrays.scan(), arrays.sizes);
    let (bte, btn, ben) = ([batch, time, channels], [batch, time, states], [batch, channels, states]);
    let grad_out = read::<f32>("grad_out", grad_out, &bte)?;
    let grad_last = read_option::<f32>("grad_last", grad_last, &ben)?;
    let borders = read::<f32>("borders", borders, &[scan.border_len()])?;
    let (dout, dlast, kept) =
        (grad_out.as_slice().expect("checked"), slice(&grad_last), borders.as_slice().expect("checked"));
    let g = py.detach(|| scan::backward(&scan, kept, dout, dlast, threads, level));
    Ok([
        shaped(py, g.u, bte)?,
        shaped(py, g.delta, bte)?,
        shaped(py, g.a, [channels, states])?,
        shaped(py, g.b, btn)?,
        shaped(py, g.c, btn)?,
        shaped(py, g.d, [channels])?,
        shaped(py, g.z, bte)?,
        shaped(py, g.delta_bias, [channels])?,
        shaped(py, g.initial, ben)?,
    ])
}

#[pyfunction]
#[pyo3(signature = (state, x, dt, a, b, c, d = None, z = None, dt_bias = None, dt_softplus = false, *, threads = 1,
    simd = None))]
#[expect(clippy::too_many_arguments, reason = "the interface of mamba_ssm")]
pub fn selective_state_update<'py>(
    py: Python<'py>,
    state: &Any<'py>,
    x: &Any<'py>,
    dt: &Any<'py>,
    a: &Any<'py>,
    b: &Any<'py>,
    c: &Any<'py>,
    d: Option<&Any<'py>>,
    z: Option<&Any<'py>>,
    dt_bias: Option<&Any<'py>>,
    dt_softplus: bool,
    threads: usize,
    simd: Option<&str>,
) -> PyResult<Option<Any<'py>>> {
    let level = level(simd)?;
    let [batch, channels, states] = sizes("state", state)?;
    let (be, bn) = ([batch, channels], [batch, states]);
    let state = array::<f32>("state", state, &[batch, channels, states])?;
    let mut state = state.try_readwrite().map_err(|_| PyValueError::new_err("state: it cannot be written to"))?;
    let (x, dt, a) = (read("x", x, &be)?, read("dt", dt, &be)?, read("a", a, &[channels, states])?);
    let (b, c) = (read("b", b, &bn)?, read("c", c, &bn)?);
    let (d, z) = (read_option("d", d, &[channels])?, read_option("z", z, &be)?);
    let dt_bias = read_option("dt_bias", dt_bias, &[channels])?;
    let step = Step {
        batch,
        channels,
        states,
        x: x.as_slice().expect("checked"),
        dt: dt.as_slice().expect("checked"),
        a: a.as_slice().expect("checked"),
        b: b.as_slice().expect("checked"),
        c: c.as_slice().expect("checked"),
        d: slice(&d),
        z: slice(&z),
        dt_bias: slice(&dt_bias),
        softplus: dt_softplus,
    };
    let state = state.as_slice_mut().expect("checked");
    let y = py.detach(|| scan::step(&step, state, threads, level));
    shaped(py, y, be)
}

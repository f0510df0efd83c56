//! Where graphs are computed.

use std::ffi::CStr;
use std::fmt;
use std::str::FromStr;

use ggml_sys as sys;

use super::Type;
use crate::{Error, Result};

/// Where graphs are computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Device {
    /// The CPU.
    #[default]
    Cpu,
    /// A GPU, by CUDA.
    Gpu {
        /// As the driver counts.
        index: usize,
        /// Weights and activations are multiplied in F32 instead of F16.
        precise: bool,
    },
    /// The GPU's kernels on the CPU, slowly: for tests.
    Emulated {
        /// As for a GPU.
        precise: bool,
    },
}

/// A GPU as its driver describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gpu {
    /// The card's name.
    pub name: String,
    /// 86 for 8.6.
    pub compute_capability: u32,
    /// Memory that nobody uses, bytes.
    pub bytes_free: u64,
    /// Memory in all, bytes.
    pub bytes_total: u64,
}

/// What `--device` asks for; [`DeviceChoice::resolve`] looks whether it is there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// `cpu`
    #[default]
    Cpu,
    /// `cuda` or `cuda:N`
    Cuda(usize),
    /// `cuda:auto`: the GPU of this rank's number among the ranks of its machine, from the first again where there are
    /// more ranks than GPUs.
    CudaOfRank,
    /// `auto`: the first GPU, or the CPU where this build has no CUDA or the driver shows no GPU.
    Auto,
    /// `emulated`: the GPU's kernels on the host, slowly; to rehearse what a GPU is to do (docs/GPU.md).
    Emulated,
}

impl FromStr for DeviceChoice {
    type Err = Error;

    fn from_str(text: &str) -> Result<DeviceChoice> {
        let index = match text.split_once(':') {
            None if text == "cpu" => return Ok(DeviceChoice::Cpu),
            None if text == "auto" => return Ok(DeviceChoice::Auto),
            None if text == "emulated" => return Ok(DeviceChoice::Emulated),
            None if text == "cuda" => Some(0),
            Some(("cuda", "auto")) => return Ok(DeviceChoice::CudaOfRank),
            Some(("cuda", index)) => index.parse().ok(),
            _ => None,
        };
        index.map(DeviceChoice::Cuda).ok_or_else(|| {
            let advice = "leave it out for the CPU";
            Error::invalid("--device", "cpu, cuda, cuda:N, cuda:auto or auto", text, advice)
        })
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            DeviceChoice::Cpu => f.write_str("cpu"),
            DeviceChoice::Cuda(index) => write!(f, "cuda:{index}"),
            DeviceChoice::CudaOfRank => f.write_str("cuda:auto"),
            DeviceChoice::Auto => f.write_str("auto"),
            DeviceChoice::Emulated => f.write_str("emulated"),
        }
    }
}

impl DeviceChoice {
    /// The device that is meant.
    ///
    /// # Errors
    /// [`Error::Engine`] when this build has no CUDA, the driver is missing or has other GPUs. Only `auto`
    /// takes the CPU instead.
    pub fn resolve(self, precise: bool) -> Result<Device> {
        match self {
            DeviceChoice::Cpu => Ok(Device::Cpu),
            DeviceChoice::Emulated => Ok(Device::Emulated { precise }),
            DeviceChoice::Auto => match gpus() {
                Ok(gpus) if !gpus.is_empty() => Ok(Device::Gpu { index: 0, precise }),
                _ => Ok(Device::Cpu),
            },
            DeviceChoice::CudaOfRank => {
                let n = gpus()?.len().max(1);
                DeviceChoice::Cuda(local_rank() % n).resolve(precise)
            }
            DeviceChoice::Cuda(index) => {
                let gpus = gpus()?;
                if index >= gpus.len() {
                    let names: Vec<_> = gpus.iter().map(|gpu| gpu.name.as_str()).collect();
                    let got = match names.len() {
                        0 => "no GPU".into(),
                        n => format!("{n}: {}", names.join(", ")),
                    };
                    let expected = format!("at least {} GPUs", index + 1);
                    let advice = "choose one of them, or --device cpu";
                    return Err(Error::invalid("--device", expected, got, advice));
                }
                Ok(Device::Gpu { index, precise })
            }
        }
    }
}

/// This process's number among those of its machine, as launchers of MPI say it; 0 without one.
fn local_rank() -> usize {
    let names = ["OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"];
    names.iter().find_map(|name| std::env::var(name).ok()?.parse().ok()).unwrap_or(0)
}

/// The GPUs that the driver shows.
///
/// # Errors
/// [`Error::Engine`] when this build has no CUDA, or with CUDA's words.
pub fn gpus() -> Result<Vec<Gpu>> {
    let failed = |advice| Err(Error::engine("looking for GPUs", last_error(), advice));
    let mut n = 0;
    // SAFETY: a place for the result; no other premise.
    let (built, status) = unsafe { (sys::bupo_cuda_built(), sys::bupo_cuda_count(&mut n)) };
    if !built {
        return failed("build with --features cuda, or use --device cpu");
    }
    if status != sys::BUPO_OK {
        return failed("install NVIDIA's driver, or use --device cpu");
    }
    let mut found = Vec::with_capacity(n as usize);
    for index in 0..n {
        // SAFETY: plain numbers and bytes, for which zero is a value.
        let mut gpu: sys::bupo_gpu = unsafe { std::mem::zeroed() };
        // SAFETY: an index in range and a place for the result.
        if unsafe { sys::bupo_cuda_info(index, &mut gpu) } != sys::BUPO_OK {
            return failed("see whether nvidia-smi works, or use --device cpu");
        }
        found.push(Gpu {
            // SAFETY: a NUL-terminated array in `gpu`.
            name: unsafe { CStr::from_ptr(gpu.name.as_ptr()) }.to_string_lossy().into_owned(),
            compute_capability: gpu.compute_capability,
            bytes_free: gpu.bytes_free,
            bytes_total: gpu.bytes_total,
        });
    }
    Ok(found)
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
            Device::Gpu { index, precise } => {
                write!(f, "cuda:{index}{}", if *precise { " (precise)" } else { "" })
            }
            Device::Emulated { .. } => f.write_str("the emulated GPU"),
        }
    }
}

impl Device {
    /// Whether its memory is the host's.
    pub fn is_host(self) -> bool {
        !matches!(self, Device::Gpu { .. })
    }

    /// Whether weights of this type can be decoded there.
    pub fn decodes(self, ty: Type) -> bool {
        match self {
            // SAFETY: no premise.
            Device::Gpu { .. } => unsafe { sys::bupo_cuda_decodes(ty.raw()) },
            _ => ty.can_dequantize(),
        }
    }

    /// Memory of a GPU that nobody uses at the moment, bytes; none for the host.
    ///
    /// # Errors
    /// See [`gpus`].
    pub fn free_bytes(self) -> Result<Option<u64>> {
        let Some(index) = self.gpu() else { return Ok(None) };
        Ok(gpus()?.get(index).map(|gpu| gpu.bytes_free))
    }

    /// The driver's number of a GPU.
    pub fn gpu(self) -> Option<usize> {
        match self {
            Device::Gpu { index, .. } => Some(index),
            _ => None,
        }
    }

    /// What allocates its memory.
    pub(super) fn buffer_type(self) -> Result<sys::ggml_backend_buffer_type_t> {
        let Device::Gpu { index, .. } = self else {
            // SAFETY: no premise.
            return Ok(unsafe { sys::ggml_backend_cpu_buffer_type() });
        };
        let mut out = std::ptr::null_mut();
        // SAFETY: a place for the result.
        if unsafe { sys::bupo_cuda_buffer_type(index as i32, &mut out) } != sys::BUPO_OK {
            return Err(Error::engine(format!("finding {self}"), last_error(), "use --device cpu"));
        }
        Ok(out)
    }

    /// llama.cpp's name of a GPU, to load a model onto it.
    pub(crate) fn raw_device(self) -> Result<Option<sys::ggml_backend_dev_t>> {
        if self.is_host() {
            return Ok(None);
        }
        // SAFETY: a live buffer type.
        Ok(Some(unsafe { sys::ggml_backend_buft_get_device(self.buffer_type()?) }))
    }
}

/// What ggml-ext last said on this thread.
pub(super) fn last_error() -> String {
    // SAFETY: a NUL-terminated string, valid until the next failing call of this thread.
    unsafe { CStr::from_ptr(sys::bupo_last_error()) }.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_are_read() {
        assert_eq!("cpu".parse::<DeviceChoice>().unwrap(), DeviceChoice::Cpu);
        assert_eq!("cuda".parse::<DeviceChoice>().unwrap(), DeviceChoice::Cuda(0));
        assert_eq!("cuda:3".parse::<DeviceChoice>().unwrap(), DeviceChoice::Cuda(3));
        assert_eq!("auto".parse::<DeviceChoice>().unwrap(), DeviceChoice::Auto);
        for bad in ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "cpu:0"] {
            assert!(bad.parse::<DeviceChoice>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_gpu_that_is_not_there_is_an_error() {
        let error = DeviceChoice::Cuda(99).resolve(false).unwrap_err().to_string();
        assert!(error.contains("--device cpu"), "{error}");
    }
}

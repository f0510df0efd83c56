//! Where a merged model comes from, for its metadata.

use std::path::Path;

use super::{Adapters, TypeChoice};
use crate::Result;
use crate::gguf::{Array, GgufSet, Value, sha256};

/// Metadata of a merged model about its making:
///
/// - `bupo.export.base`, `bupo.export.base_sha256`: file name and hash of the base
/// - `bupo.export.type`: as asked for
/// - `bupo.export.adapters`, `.adapter_sha256`, `.adapter_factors`: arrays, one entry an adapter
/// - what training wrote into the first adapter: `bupo.algorithm`, `bupo.internal_layer`, `bupo.steps`, ..;
///   of others the same below `bupo.adapter2.`, ..
pub(super) fn metadata(
    base: (&GgufSet, &str),
    adapters: &Adapters,
    ty: TypeChoice,
) -> Result<Vec<(String, Value)>> {
    let file_name =
        |path: &Path| path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
    let (base, name) = base;
    let mut entries: Vec<(String, Value)> = vec![
        ("bupo.export.base".into(), file_name(Path::new(name)).into()),
        ("bupo.export.base_sha256".into(), base.sha256().into()),
        ("bupo.export.type".into(), ty.to_string().into()),
    ];
    if adapters.is_empty() {
        return Ok(entries);
    }
    let names = adapters.iter().map(|(spec, _)| file_name(&spec.path));
    let hashes = adapters.iter().map(|(spec, _)| sha256(&spec.path)).collect::<Result<Vec<_>>>()?;
    let factors: Vec<f32> = adapters.iter().map(|(spec, _)| spec.factor).collect();
    entries.push(("bupo.export.adapters".into(), Array::strings(names).into()));
    entries.push(("bupo.export.adapter_sha256".into(), Array::strings(hashes).into()));
    entries.push(("bupo.export.adapter_factors".into(), Array::from(&factors[..]).into()));
    for (i, (_, file)) in adapters.iter().enumerate() {
        for (key, value) in &file.extra {
            let Some(rest) = key.strip_prefix("bupo.") else { continue };
            let key = if i == 0 { key.clone() } else { format!("bupo.adapter{}.{rest}", i + 1) };
            entries.push((key, value.clone()));
        }
    }
    Ok(entries)
}

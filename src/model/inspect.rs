//! What a model file holds, read from its header alone: no weight is loaded.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use serde::Serialize;

use super::{DEMO, DEMO_BYTES, Model};
use crate::Result;
use crate::gguf::{GgufFile, TensorInfo, Value, split_paths};

/// Where the entropies of a layer's internal policies are taken (PAPER section 1).
const TAPS: [&str; 6] = ["layer_in", "attn_in", "attn_out", "ffn_in", "ffn_out", "layer_out"];

/// Tensors of one type.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct TypeUse {
    /// How many.
    pub tensors: usize,
    /// Elements.
    pub parameters: u64,
    /// Bytes.
    pub bytes: u64,
}

/// One kind of weight that an adapter can be trained on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Trainable {
    /// Name on the command line: `q`, `gate`, ...
    pub target: &'static str,
    /// Name in the file, `blk.N.` before it.
    pub tensor: String,
    /// Inputs and outputs; of the first layer that has it.
    pub shape: [u64; 2],
    /// Whether other layers have it in other sizes.
    pub varies: bool,
    /// Layers that have it.
    pub layers: usize,
    /// Types of those.
    pub types: Vec<&'static str>,
}

/// Layers of one kind: equal in every size.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LayerKind {
    /// Which, from 1.
    pub layers: Vec<usize>,
    /// What mixes tokens: `attention` or `delta net`.
    pub mixer: &'static str,
    /// Query and key/value heads; key and value heads of a delta net.
    pub heads: [usize; 2],
    /// Size of a head.
    pub head_size: usize,
    /// Width of the FFN.
    pub ffn_width: usize,
    /// Tokens that a query sees; none is all before it.
    pub window: Option<usize>,
    /// Base of the rotation; none where nothing rotates.
    pub rope_base: Option<f32>,
    /// Whether it has keys and values of its own.
    pub own_keys: bool,
    /// Tokens of a delta net's convolution.
    pub convolution: Option<usize>,
}

/// A model file described.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Description {
    /// Path as given.
    pub model: String,
    /// `general.name`.
    pub name: Option<String>,
    /// `general.architecture`.
    pub architecture: String,
    /// Files: 1, or the parts of a split set.
    pub files: usize,
    /// Bytes of all files.
    pub file_bytes: u64,
    /// All elements of all tensors.
    pub parameters: u64,
    /// Those that a token goes through, of a mixture of experts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub active_parameters: Option<u64>,
    /// How many experts a layer has and how many a token takes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub experts: Option<[u64; 2]>,
    /// Layers, L.
    pub layers: Option<u64>,
    /// Width of the residual, D.
    pub width: Option<u64>,
    /// Width of the FFN.
    pub ffn_width: Option<u64>,
    /// Query and key/value heads.
    pub heads: [Option<u64>; 2],
    /// Size of a head.
    pub head_size: Option<u64>,
    /// Layers by kind, of a model that opens.
    pub layer_kinds: Vec<LayerKind>,
    /// Tokens.
    pub vocabulary: Option<u64>,
    /// Context the model was trained on, tokens.
    pub context: Option<u64>,
    /// Base of the rotary embedding, and its scaling.
    pub rope: String,
    /// Whether there is a chat template.
    pub chat_template: bool,
    /// Whether the embedding is the unembedding too.
    pub tied: bool,
    /// Tensor types.
    pub types: BTreeMap<&'static str, TypeUse>,
    /// Tensors that are left alone: of a vision part, or of blocks that predict further tokens.
    pub left_alone: Vec<String>,
    /// A window that the file declares and llama.cpp does not apply to this architecture, tokens.
    pub window_ignored: Option<u64>,
    /// Taps of each layer.
    pub taps: Vec<&'static str>,
    /// What an adapter can be trained on.
    pub trainable: Vec<Trainable>,
    /// Why this program cannot open the model; none where it can.
    pub refused: Option<String>,
}

impl Description {
    /// Reads the header of a GGUF file (of a split set: of all parts), or of the embedded model.
    ///
    /// # Errors
    /// When it is no sound GGUF file.
    pub fn read(path: &Path) -> Result<Description> {
        let files = if path.as_os_str() == DEMO {
            vec![GgufFile::from_bytes(DEMO_BYTES, DEMO)?]
        } else {
            let paths = split_paths(path)?;
            paths.iter().map(|p| GgufFile::open(p)).collect::<Result<Vec<_>>>()?
        };
        let first = &files[0];
        first.require_model()?;
        let architecture = first.architecture()?.to_owned();
        let outline = Model::outline(path);
        let refused = outline.as_ref().err().map(ToString::to_string);
        let model = outline.ok();
        let get = |key: &str| first.get(&format!("{architecture}.{key}"));
        let size =
            |key: &str| get(key).and_then(Value::integer).and_then(|n| u64::try_from(n).ok());
        let mut types: BTreeMap<&'static str, TypeUse> = BTreeMap::new();
        let tensors = || files.iter().flat_map(|f| f.tensors());
        for tensor in tensors() {
            let entry = types.entry(tensor.ty.name()).or_default();
            entry.tensors += 1;
            entry.parameters += tensor.n_elements();
            entry.bytes += tensor.n_bytes();
        }
        let scaling = get("rope.scaling.type").map(|v| v.to_string());
        let llama3 = tensors().any(|t| t.name == "rope_freqs.weight");
        let factors = if architecture == "llama" { "llama3" } else { "by factors" };
        let scaling = scaling.unwrap_or_else(|| if llama3 { factors } else { "none" }.into());
        let base = get("rope.freq_base").map_or("10000".into(), ToString::to_string);
        let width = size("embedding_length");
        let heads = [size("attention.head_count"), size("attention.head_count_kv")];
        let derived = width.zip(heads[0]).and_then(|(d, n)| d.checked_div(n));
        let vocabulary = match first.get("tokenizer.ggml.tokens") {
            Some(Value::Array(tokens)) => Some(tokens.len() as u64),
            _ => None,
        };
        let experts = size("expert_count").zip(size("expert_used_count"));
        let experts = experts.filter(|(count, _)| *count > 0).map(|(count, used)| [count, used]);
        Ok(Description {
            model: path.display().to_string(),
            name: first.find::<&str>("general.name").ok().flatten().map(str::to_owned),
            files: files.len(),
            file_bytes: files.iter().map(GgufFile::n_bytes).sum(),
            parameters: types.values().map(|t| t.parameters).sum(),
            active_parameters: experts.map(|[count, used]| {
                // Each expert's part of a stack is equal.
                let of = |t: &TensorInfo| match t.name.contains("_exps.") {
                    true => t.n_elements() / count * used,
                    false => t.n_elements(),
                };
                tensors().map(of).sum()
            }),
            experts,
            layers: size("block_count"),
            width,
            ffn_width: size("feed_forward_length"),
            heads: [heads[0], heads[1].or(heads[0])],
            head_size: size("attention.key_length").or(derived),
            layer_kinds: model.as_ref().map_or(Vec::new(), layer_kinds),
            vocabulary,
            context: size("context_length"),
            rope: format!("base {base}, scaling {scaling}"),
            chat_template: first.get("tokenizer.chat_template").is_some(),
            tied: !tensors().any(|t| t.name == "output.weight"),
            types,
            left_alone: model.as_ref().map_or(Vec::new(), |model| {
                let names = tensors().map(|t| t.name.as_str());
                names.filter(|name| model.leaves_alone(name)).map(str::to_owned).collect()
            }),
            window_ignored: size("attention.sliding_window").filter(|&n| {
                n > 0
                    && model
                        .as_ref()
                        .is_some_and(|m| m.config().layers.iter().all(|l| l.window.is_none()))
            }),
            taps: TAPS.to_vec(),
            trainable: model.as_ref().map_or(Vec::new(), |model| trainable(model, &files)),
            refused,
            architecture,
        })
    }
}

fn layer_kinds(model: &Model) -> Vec<LayerKind> {
    let mut kinds: Vec<LayerKind> = Vec::new();
    for (i, l) in model.config().layers.iter().enumerate() {
        let kind = LayerKind {
            layers: Vec::new(),
            mixer: l.mixer(),
            heads: l.delta.map_or([l.n_head, l.n_head_kv], |d| [d.n_k, d.n_v]),
            head_size: l.delta.map_or(l.head_size, |d| d.size),
            ffn_width: l.ffn_width(),
            window: l.window,
            rope_base: l.rope.map(|rope| rope.freq_base),
            own_keys: l.has_kv,
            convolution: l.delta.map(|d| d.kernel),
        };
        match kinds.iter_mut().find(|k| LayerKind { layers: Vec::new(), ..(*k).clone() } == kind) {
            Some(known) => known.layers.push(i + 1),
            None => kinds.push(LayerKind { layers: vec![i + 1], ..kind }),
        }
    }
    kinds
}

fn trainable(model: &Model, files: &[GgufFile]) -> Vec<Trainable> {
    let types: BTreeMap<&str, &str> =
        files.iter().flat_map(|f| f.tensors()).map(|t| (t.name.as_str(), t.ty.name())).collect();
    let mut found: Vec<Trainable> = Vec::new();
    for map in model.maps() {
        let Some(target) = map.target else { continue };
        let shape = [map.n_in as u64, map.n_out as u64];
        let named = format!("{}.weight", map.name);
        let known = found.iter_mut().find(|t| t.target == target && t.tensor == named);
        let entry = match known {
            Some(entry) => entry,
            None => {
                let (tensor, layers, types) = (named, 0, Vec::new());
                found.push(Trainable { target, tensor, shape, varies: false, layers, types });
                found.last_mut().expect("just pushed")
            }
        };
        entry.layers += 1;
        entry.varies |= entry.shape != shape;
        entry.types.extend(types.get(map.weight().as_str()));
        entry.types.sort();
        entry.types.dedup();
    }
    found
}

impl fmt::Display for LayerKind {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let [n_head, n_head_kv] = self.heads;
        if let Some(tokens) = self.convolution {
            return write!(
                f,
                "{:<12}FFN {}, {} of {n_head} key and {n_head_kv} value heads of {}, convolution of {tokens} tokens",
                runs(&self.layers),
                self.ffn_width,
                self.mixer,
                self.head_size
            );
        }
        let window = self.window.map_or(String::new(), |n| format!(", window {n}"));
        let rope = self.rope_base.map_or(", no positions".into(), |b| format!(", rope base {b}"));
        let keys = if self.own_keys { "" } else { ", keys and values of an earlier layer" };
        write!(
            f,
            "{:<12}FFN {}, {n_head} heads ({n_head_kv} key/value) of {}{window}{rope}{keys}",
            runs(&self.layers),
            self.ffn_width,
            self.head_size
        )
    }
}

/// `1-5,7-11,13`
pub fn runs(layers: &[usize]) -> String {
    let mut text = String::new();
    for run in layers.chunk_by(|a, b| a + 1 == *b) {
        let (first, last) = (run[0], run[run.len() - 1]);
        let comma = if text.is_empty() { "" } else { "," };
        text += &match run.len() {
            1 => format!("{comma}{first}"),
            _ => format!("{comma}{first}-{last}"),
        };
    }
    text
}

impl fmt::Display for Description {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let number = |n: Option<u64>| n.map_or("?".into(), |n| n.to_string());
        let mib = |bytes: u64| bytes as f64 / (1 << 20) as f64;
        let name = self.name.as_deref().unwrap_or("no name");
        writeln!(f, "model         {}: {} ({name})", self.model, self.architecture)?;
        let (million, size) = (self.parameters as f64 / 1e6, mib(self.file_bytes));
        let plural = if self.files == 1 { "" } else { "s" };
        writeln!(
            f,
            "size          {million:.1} M parameters, {size:.1} MiB in {} file{plural}",
            self.files
        )?;
        if self.layer_kinds.len() > 1 {
            writeln!(f, "layers        {} of width {}", number(self.layers), number(self.width))?;
            self.layer_kinds.iter().try_for_each(|kind| writeln!(f, "  {kind}"))?;
        } else {
            writeln!(
                f,
                "layers        {} of width {}, FFN {}, {} heads ({} key/value) of {}",
                number(self.layers),
                number(self.width),
                number(self.ffn_width),
                number(self.heads[0]),
                number(self.heads[1]),
                number(self.head_size)
            )?;
        }
        if let (Some([count, used]), Some(active)) = (self.experts, self.active_parameters) {
            let million = active as f64 / 1e6;
            writeln!(
                f,
                "experts       {count} a layer, of which a token takes {used}: {million:.1} M parameters are active"
            )?;
        }
        let tied = if self.tied { "tied" } else { "of its own" };
        writeln!(f, "vocabulary    {} tokens, unembedding {tied}", number(self.vocabulary))?;
        writeln!(f, "context       {} tokens; rope {}", number(self.context), self.rope)?;
        if let Some(window) = self.window_ignored {
            writeln!(
                f,
                "windows       none: the file declares {window} tokens, which llama.cpp does not apply to {}",
                self.architecture
            )?;
        }
        if let Some(first) = self.left_alone.first() {
            let n = self.left_alone.len();
            writeln!(
                f,
                "left alone    {n} tensors that the layers do not read, {first} the first"
            )?;
        }
        let template = if self.chat_template { "in the file" } else { "none" };
        writeln!(f, "chat template {template}")?;
        writeln!(f, "types         tensors  parameters        MiB")?;
        for (name, ty) in &self.types {
            let (n, parameters, size) = (ty.tensors, ty.parameters, mib(ty.bytes));
            writeln!(f, "  {name:<10}  {n:>8}  {parameters:>10}  {size:>9.1}")?;
        }
        writeln!(f, "taps          {} (each layer)", self.taps.join(", "))?;
        writeln!(f, "trainable     weight              inputs  outputs  layers  type")?;
        for t in &self.trainable {
            let ([n_in, n_out], types) = (t.shape, t.types.join(", "));
            let (target, tensor, layers) = (t.target, &t.tensor, t.layers);
            writeln!(
                f,
                "  {target:<10}  {tensor:<18}  {n_in:>6}  {n_out:>7}  {layers:>6}  {types}"
            )?;
        }
        match &self.refused {
            Some(reason) => write!(f, "refused       {reason}"),
            None => write!(f, "opens         yes"),
        }
    }
}

//! The teacher of a distillation: another model with the same vocabulary, or the student's own, which is then open once.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::TrainConfig;
use crate::ggml::ThreadPool;
use crate::model::{Batch, DEMO, Engine, Lora, Model, Placement, TeacherHidden};
use crate::{Error, Result};

/// Gives its final policy on whatever the student is trained on. Adapter off where it has none.
pub struct Teacher<'m> {
    model: TeacherModel<'m>,
    lora: Option<Lora>,
    engine: Engine,
}

/// Whose weights a teacher has.
pub enum TeacherModel<'m> {
    /// The student's own, in another state of adapter.
    Students(&'m Model),
    /// Another file's.
    Another(Box<Model>),
}

impl std::ops::Deref for TeacherModel<'_> {
    type Target = Model;

    fn deref(&self) -> &Model {
        match self {
            TeacherModel::Students(model) => model,
            TeacherModel::Another(model) => model,
        }
    }
}

impl<'m> TeacherModel<'m> {
    /// Opens `--teacher`, where there is one, and holds its vocabulary against the student's, id by id.
    ///
    /// # Errors
    /// Those of [`Model::open`], and [`Error::Invalid`] naming the first token that differs.
    pub fn open(student: &'m Model, config: &TrainConfig) -> Result<Option<TeacherModel<'m>>> {
        let Some(path) = &config.rows.teacher else { return Ok(None) };
        if is_same_file(student, path) {
            return Ok(Some(TeacherModel::Students(student)));
        }
        let placement = Placement { device: student.device(), gpu_layers: config.gpu_layers };
        let model = Model::open_on(path, placement)?;
        check_vocabulary(student, &model)?;
        Ok(Some(TeacherModel::Another(Box::new(model))))
    }

    /// The files of its weights, where they are not the student's.
    pub fn own_files(&self) -> &[PathBuf] {
        match self {
            TeacherModel::Students(_) => &[],
            TeacherModel::Another(model) => model.files(),
        }
    }
}

fn is_same_file(student: &Model, path: &Path) -> bool {
    let same = |file: &Path| match (file.canonicalize(), path.canonicalize()) {
        (Ok(a), Ok(b)) => a == b,
        _ => false,
    };
    match path.as_os_str() == DEMO {
        true => student.name() == DEMO,
        false => student.files().first().is_some_and(|file| same(file)),
    }
}

/// Divergences are not computed under an adapted unembedding, of the student or the teacher.
///
/// # Errors
/// [`Error::Invalid`] naming the pair.
pub(super) fn refuse_head(lora: &Lora, path: &Path) -> Result<()> {
    let frozen = lora.frozen();
    if frozen.is_empty() {
        return Ok(());
    }
    let expected = "an adapter of the layers for --algo distill";
    let advice = "divergences are not computed under an adapted unembedding; merge it first";
    Err(Error::invalid(path.display().to_string(), expected, frozen.join(", "), advice))
}

/// Distributions can only be compared over the same tokens.
fn check_vocabulary(student: &Model, teacher: &Model) -> Result<()> {
    let refuse = |expected: String, got: String| {
        let advice = "distil from a model of the same family, whose vocabulary is the student's";
        Err(Error::invalid(format!("--teacher {}", teacher.name()), expected, got, advice))
    };
    let [ours, theirs] = [student, teacher].map(|model| model.config().n_vocab);
    if ours != theirs {
        let words = |n: usize| format!("{n} tokens");
        return refuse(format!("the student's {}", words(ours)), words(theirs));
    }
    let [a, b] = [student, teacher].map(|model| model.engine().vocab());
    match (0..ours as i32).find(|&id| a.spelling(id) != b.spelling(id)) {
        None => Ok(()),
        Some(id) => refuse(
            format!("the student's vocabulary, whose token {id} is {:?}", a.spelling(id)),
            format!("{:?}", b.spelling(id)),
        ),
    }
}

impl<'m> Teacher<'m> {
    /// A teacher of this model, with its adapter.
    ///
    /// # Errors
    /// The adapter cannot be read or does not fit.
    pub fn new(
        model: TeacherModel<'m>,
        config: &TrainConfig,
        pool: Arc<ThreadPool>,
    ) -> Result<Teacher<'m>> {
        let adapter = config.rows.teacher_adapter.as_ref();
        let lora = adapter.map(|path| Lora::load(&model, path)).transpose()?;
        if let (Some(lora), Some(path)) = (&lora, adapter) {
            refuse_head(lora, path)?;
        }
        let engine = Engine::on(model.device(), pool)?;
        Ok(Teacher { model, lora, engine })
    }

    /// Its last hidden states of a batch's scored tokens.
    ///
    /// # Errors
    /// Those of [`Engine::forward`].
    pub fn hidden(&mut self, batch: &Batch) -> Result<TeacherHidden<'_>> {
        TeacherHidden::new(&mut self.engine, &self.model, self.lora.as_ref(), batch)
    }

    /// The files of its weights, where they are not the student's.
    pub fn files(&self) -> &[PathBuf] {
        self.model.own_files()
    }

    /// Gives memory back, for rollouts to use.
    pub fn release(&mut self) {
        self.engine.release();
    }
}

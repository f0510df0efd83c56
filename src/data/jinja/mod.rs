//! Jinja as Hugging Face's chat templates use it: the environment that `apply_chat_template` of transformers
//! 5.24 (`utils/chat_template_utils.py`) builds on Jinja 3.1.6, on minijinja.
//!
//! `trim_blocks` and `lstrip_blocks` are on; there are loop controls and the `{% generation %}` tag (which
//! marks what is trained and has no effect on the text), `raise_exception`, `strftime_now`, a `tojson` that is
//! `json.dumps`, and Python's methods of texts, lists, tuples, dictionaries and numbers, as far as the sandbox
//! lets a template call them. `tests/templates.rs` holds it against transformers.
//!
//! Departures, each refused where a template needs it unless it is said what happens: dates are UTC, not
//! local; macros have no `varargs` and `kwargs`; `\N{NAME}` in a text; `str.encode`; the filters `random`,
//! `urlize`, `wordwrap` and `xmlattr`; `%` formats only after a text in quotes (`'%s' % x`); `attr` looks into
//! dictionaries, too; `range` and methods that are not called print as what they hold.

mod dates;
mod filters;
mod format;
mod json;
mod python;
mod rewrite;
mod strings;

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Object, Rest, Tuple};
use minijinja::{Environment, Error, ErrorKind, State, Value};

pub use dates::unix_now_s;
pub(super) use json::from_json;

/// What a filter or a method gives.
type Outcome<T = Value> = std::result::Result<T, Error>;

/// The environment with one template in it. `now`: what `strftime_now` takes for now, in seconds of Unix
/// time; negative is the clock's. `fuel`: instructions, and one more for each 64 bytes that they make.
pub(super) fn environment(
    name: &str,
    source: &str,
    fuel: u64,
    now: Arc<AtomicI64>,
) -> Outcome<Environment<'static>> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?;
    environment.set_syntax(syntax);
    environment.set_fuel(Some(fuel));
    environment.set_unknown_method_callback(|state, value, method, args| {
        python::method(state, value, method, args)
    });
    environment.set_formatter(python::write);
    environment.add_function("raise_exception", |message: &str| -> Outcome {
        Err(refused(message.to_owned()))
    });
    environment.add_function("strftime_now", move |format: &str| {
        let now = now.load(Ordering::Relaxed);
        dates::strftime(format, if now < 0 { unix_now_s() } else { now })
    });
    environment.add_global("dict", Value::from_object(Dict));
    environment
        .add_function("cycler", |items: Rest<Value>| minijinja_contrib::globals::cycler(items.0));
    environment.add_function("joiner", minijinja_contrib::globals::joiner);
    filters::add(&mut environment);
    environment.add_template_owned(name.to_owned(), rewrite::rewrite(source))?;
    Ok(environment)
}

/// What a template is refused for.
fn refused(reason: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, reason)
}

/// Arguments by place or by name, as a Python function of these parameters takes them; none where the
/// template gives none.
fn bind<const N: usize>(
    args: &[Value],
    kwargs: &Kwargs,
    names: [&str; N],
) -> Outcome<[Option<Value>; N]> {
    if args.len() > N {
        return Err(Error::new(ErrorKind::TooManyArguments, format!("at most {N}")));
    }
    let mut bound = [const { None }; N];
    for (slot, (i, name)) in bound.iter_mut().zip(names.into_iter().enumerate()) {
        *slot = kwargs.get::<Option<Value>>(name)?;
        if let Some(value) = args.get(i) {
            if slot.is_some() {
                return Err(refused(format!("two values for {name}")));
            }
            *slot = Some(value.clone());
        }
    }
    kwargs.assert_all_used()?;
    Ok(bound)
}

fn text(value: &Value) -> Outcome<&str> {
    value.as_str().ok_or_else(|| refused(format!("expected a text, got {}", value.kind())))
}

fn integer(value: &Value) -> Outcome<i64> {
    value.as_i64().ok_or_else(|| refused(format!("expected a whole number, got {}", value.kind())))
}

/// Pays for bytes that are about to be made.
fn charge(state: &State, n_bytes: usize) -> Outcome<()> {
    state.consume_fuel(n_bytes as u64 / 64)
}

/// The `dict` of a template: a call, and `fromkeys`.
#[derive(Debug)]
struct Dict;

impl Object for Dict {
    fn call(self: &Arc<Self>, _: &mut State, args: &[Value]) -> Outcome {
        let (args, kwargs): (&[Value], Kwargs) = minijinja::value::from_args(args)?;
        let mut pairs: Vec<(Value, Value)> = Vec::new();
        let mut put = |key: Value, value: Value| match pairs.iter_mut().find(|(k, _)| *k == key) {
            Some((_, old)) => *old = value,
            None => pairs.push((key, value)),
        };
        match args {
            [] => {}
            [map] if map.kind() == minijinja::value::ValueKind::Map => {
                for key in map.try_iter()? {
                    let value = map.get_item(&key)?;
                    put(key, value);
                }
            }
            [list] => {
                for pair in list.try_iter()? {
                    put(pair.get_item_by_index(0)?, pair.get_item_by_index(1)?);
                }
            }
            _ => return Err(Error::from(ErrorKind::TooManyArguments)),
        }
        for key in kwargs.args() {
            put(key.into(), kwargs.get(key)?);
        }
        Ok(Value::from_pairs(pairs))
    }

    fn call_method(self: &Arc<Self>, _: &mut State, method: &str, args: &[Value]) -> Outcome {
        if method != "fromkeys" {
            return Err(Error::from(ErrorKind::UnknownMethod));
        }
        let (keys, value): (Value, Option<Value>) = minijinja::value::from_args(args)?;
        let value = value.unwrap_or_else(|| Value::from(()));
        Ok(Value::from_pairs(keys.try_iter()?.map(|key| (key, value.clone()))))
    }
}

/// A tuple of texts.
fn texts<const N: usize>(parts: [&str; N]) -> Value {
    Value::from(Tuple::new(parts.iter().map(|part| Value::from(*part)).collect()))
}

//! What must be the same on every rank before a run begins.

use std::path::Path;

use super::Team;
use crate::gguf::sha256;
use crate::{Error, Result};

/// Something that has to be the same everywhere.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Fact {
    /// What it is: "program", "model".
    pub name: String,
    /// What it is here.
    pub value: String,
    /// What to do where it differs.
    pub advice: String,
}

impl Fact {
    /// A fact.
    pub fn new(
        name: impl Into<String>,
        value: impl Into<String>,
        advice: impl Into<String>,
    ) -> Fact {
        Fact { name: name.into(), value: value.into(), advice: advice.into() }
    }

    /// The bytes of this program.
    ///
    /// # Errors
    /// Its file cannot be read.
    pub fn program() -> Result<Fact> {
        let path = std::env::current_exe().map_err(Error::io("find", "the program's own file"))?;
        let advice = "start the same file on every machine";
        Ok(Fact::new("the program's SHA-256", sha256(&path)?, advice))
    }

    /// What of a processor decides about last bits: instructions that kernels choose by, caches that products are cut for.
    pub fn processor() -> Fact {
        let caches = ["index0", "index1", "index2"].map(|index| {
            let read = |name: &str| {
                let path = Path::new("/sys/devices/system/cpu/cpu0/cache").join(index).join(name);
                std::fs::read_to_string(path).unwrap_or_default().trim().to_string()
            };
            format!("L{} {} {}", read("level"), read("type"), read("size"))
        });
        let value = format!("{}; {}", instructions().join(" "), caches.join(", "));
        let advice =
            "use machines of one kind, or add --allow-mixed: sums then depend on who computed what";
        Fact::new("processor", value, advice)
    }
}

/// Vector instructions that this processor has, of those that kernels choose by.
fn instructions() -> Vec<&'static str> {
    #[allow(unused_mut)]
    let mut found = vec![std::env::consts::ARCH];
    #[cfg(target_arch = "x86_64")]
    {
        macro_rules! note {
            ($($name:tt),*) => { $(if std::arch::is_x86_feature_detected!($name) { found.push($name); })* };
        }
        note!("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512vnni", "avx512bf16");
    }
    #[cfg(target_arch = "aarch64")]
    {
        macro_rules! note {
            ($($name:tt),*) => { $(if std::arch::is_aarch64_feature_detected!($name) { found.push($name); })* };
        }
        note!("neon", "dotprod", "i8mm", "fp16", "sve");
    }
    found
}

impl Team {
    /// Refuses ranks that differ from the first one in any of these.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the first that does, and its machine; the same on every rank.
    pub fn alike(&self, facts: &[Fact]) -> Result<()> {
        match (self.difference(facts)?, &self.0) {
            (Some(error), Some(link)) => {
                link.agree();
                Err(error)
            }
            _ => Ok(()),
        }
    }

    /// What [`Team::alike`] would refuse.
    pub fn difference(&self, facts: &[Fact]) -> Result<Option<Error>> {
        let all = self.each(facts.to_vec())?;
        let found = all.iter().enumerate().find_map(|(rank, theirs)| {
            let (here, there) = differing(&all[0], theirs)?;
            Some(Error::invalid(
                format!("{}: {}", self.name(rank), here.name),
                format!("{} as {} has", here.value, self.name(0)),
                there,
                here.advice.clone(),
            ))
        });
        Ok(found)
    }
}

/// The first fact in which others differ, and what they have.
fn differing<'f>(first: &'f [Fact], other: &'f [Fact]) -> Option<(&'f Fact, &'f str)> {
    first.iter().find_map(|fact| {
        let theirs = other.iter().find(|f| f.name == fact.name).map_or("none", |f| &f.value);
        (theirs != fact.value).then_some((fact, theirs))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_difference_is_found() {
        let fact = |name: &str, value: &str| Fact::new(name, value, "mend it");
        let first = [fact("model", "a"), fact("threads", "2")];
        assert_eq!(differing(&first, &first), None);
        let other = [fact("threads", "4"), fact("model", "a")];
        assert_eq!(differing(&first, &other), Some((&first[1], "4")));
        assert_eq!(differing(&first, &other[1..]), Some((&first[1], "none")));
    }

    #[test]
    fn a_processor_says_what_it_has() {
        let Fact { value, .. } = Fact::processor();
        assert!(value.starts_with(std::env::consts::ARCH), "{value}");
    }
}

//! A Modelfile for Ollama, which asks for templates in Go's language where GGUF files have Jinja.
//!
//! What the model's own template puts before and after each message is found by rendering a conversation of marks
//! with it. The Go template made of that is used only if it gives the very text of the Jinja one for conversations
//! with and without a system message, of one turn and of several; else Ollama is left to its own reading of the file.

use crate::Result;
use crate::data::Message;
use crate::data::chat::ChatTemplate;
use crate::gguf::GgufFile;

const TEMPLATE: &str = "tokenizer.chat_template";
/// Days apart, seconds of Unix time: a template that writes the date gives two texts.
const DAYS: [i64; 2] = [1_700_000_000, 1_750_000_000];

/// What stands around messages.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Wrappers {
    /// Before everything, where there is no system message.
    no_system: String,
    /// None: the template takes no system message.
    system: Option<[String; 2]>,
    user: [String; 2],
    assistant: [String; 2],
    /// Where the assistant begins.
    generation: String,
}

/// The text of a Modelfile for `file` beside it, and why its template was left out where it was.
///
/// # Errors
/// A model without a vocabulary.
pub fn modelfile(model: &GgufFile, file: &str) -> Result<(String, Option<String>)> {
    let vocabulary = Vocabulary::of(model)?;
    let mut text = format!("FROM ./{file}\n");
    let found = match model.find::<&str>(TEMPLATE)? {
        Some(source) => wrappers(source, &vocabulary),
        None => Err("the model has no chat template"),
    };
    let mut stops = vocabulary.ends.clone();
    let note = match found {
        Ok(found) => {
            text += &format!("TEMPLATE \"\"\"{}\"\"\"\n", found.go());
            let end = found.assistant[1].trim();
            if vocabulary.holds(end) && !stops.iter().any(|stop| stop == end) {
                stops.push(end.into());
            }
            None
        }
        Err(why) => {
            text += &format!("# No TEMPLATE, for {why}: Ollama chooses one itself.\n");
            Some(format!("no TEMPLATE in the Modelfile, for {why}; Ollama chooses one itself"))
        }
    };
    for stop in stops {
        text += &format!("PARAMETER stop \"{}\"\n", stop.replace('"', "\\\""));
    }
    Ok((text, note))
}

/// The tokens that matter for templates.
struct Vocabulary<'f> {
    tokens: Vec<&'f str>,
    bos: String,
    eos: String,
    /// Whether the engine itself puts BOS before a text.
    adds_bos: bool,
    /// Texts that end an answer.
    ends: Vec<String>,
}

impl<'f> Vocabulary<'f> {
    fn of(model: &'f GgufFile) -> Result<Vocabulary<'f>> {
        let tokens = model.strings("tokenizer.ggml.tokens")?;
        let spelling = |name: &str| -> Result<Option<String>> {
            let id: Option<u32> = model.find(&format!("tokenizer.ggml.{name}_token_id"))?;
            Ok(id.and_then(|id| tokens.get(id as usize)).map(|text| text.to_string()))
        };
        let (bos, eos) = (spelling("bos")?, spelling("eos")?);
        let mut ends = Vec::new();
        for end in [eos.clone(), spelling("eot")?, spelling("eom")?].into_iter().flatten() {
            if !end.is_empty() && !ends.contains(&end) {
                ends.push(end);
            }
        }
        let adds_bos = model.find("tokenizer.ggml.add_bos_token")?.unwrap_or(true);
        let (bos, eos) = (bos.unwrap_or_default(), eos.unwrap_or_default());
        Ok(Vocabulary { tokens, bos, eos, adds_bos, ends })
    }

    fn holds(&self, text: &str) -> bool {
        !text.is_empty() && self.tokens.contains(&text)
    }

    /// A prompt as Ollama must give it: the engine puts BOS before it.
    fn without_bos<'t>(&self, text: &'t str) -> &'t str {
        match text.strip_prefix(&self.bos) {
            Some(rest) if self.adds_bos && !self.bos.is_empty() => rest,
            _ => text,
        }
    }
}

/// The model's template as wrappers; or why it cannot be said so.
fn wrappers(source: &str, vocabulary: &Vocabulary) -> Result<Wrappers, &'static str> {
    const REFUSES: &str = "its own template refuses a conversation of two turns";
    const DOES_MORE: &str = "its own template does more than write words around messages";
    let Ok(template) = ChatTemplate::new(source, &vocabulary.bos, &vocabulary.eos) else {
        return Err("its own template cannot be read");
    };
    let render = |roles: &[&str], day: i64| -> Result<String> {
        template.set_now(day);
        let text = template.render(&conversation(roles), true)?;
        Ok(vocabulary.without_bos(&text).to_owned())
    };
    let talk = ["user", "assistant", "user"];
    let plain = render(&talk, DAYS[0]).map_err(|_| REFUSES)?;
    if plain != render(&talk, DAYS[1]).map_err(|_| REFUSES)? {
        return Err("its own template writes the date");
    }
    let with_system = render(&["system", "user", "assistant", "user"], DAYS[0]).ok();
    let found = Wrappers::find(&plain, with_system.as_deref()).ok_or(DOES_MORE)?;
    let mut cases: Vec<Vec<&str>> =
        vec![vec!["user"], talk.into(), [&talk[..], &talk[1..]].concat()];
    if found.system.is_some() {
        for i in 0..cases.len() {
            cases.push([&["system"][..], &cases[i]].concat());
        }
    }
    for roles in cases {
        let own = render(&roles, DAYS[0]).map_err(|_| DOES_MORE)?;
        if own != found.render(&conversation(&roles)) {
            return Err(DOES_MORE);
        }
    }
    if found.go().contains("\"\"\"") || found.pieces().any(|piece| piece.contains("{{")) {
        return Err("its own template writes what Go's would read as its own");
    }
    Ok(found)
}

/// A conversation of marks that no template holds.
fn conversation(roles: &[&str]) -> Vec<Message> {
    let said = |(i, role): (usize, &&str)| Message {
        role: role.to_string(),
        content: format!("Qz{i}mark{i}zQ"),
    };
    roles.iter().enumerate().map(said).collect()
}

/// The text between marks: one piece more than there are messages.
fn pieces(text: &str, messages: usize) -> Option<Vec<&str>> {
    let mut rest = text;
    let mut pieces = Vec::new();
    for i in 0..messages {
        let (before, after) = rest.split_once(&format!("Qz{i}mark{i}zQ"))?;
        pieces.push(before);
        rest = after;
    }
    pieces.push(rest);
    Some(pieces)
}

fn common_suffix<'t>(a: &'t str, b: &str) -> &'t str {
    let same = a.chars().rev().zip(b.chars().rev()).take_while(|(a, b)| a == b);
    let bytes: usize = same.map(|(a, _)| a.len_utf8()).sum();
    &a[a.len() - bytes..]
}

impl Wrappers {
    /// From user, assistant, user, and the same after a system message where that is taken.
    fn find(plain: &str, with_system: Option<&str>) -> Option<Wrappers> {
        let plain = pieces(plain, 3)?;
        let [first, answer, between, end] = plain[..] else { return None };
        let with_system = match with_system {
            Some(text) => Some(pieces(text, 4)?),
            None => None,
        };
        let mut before_user = common_suffix(first, between);
        if let Some([_, after_system, ..]) = with_system.as_deref() {
            before_user = common_suffix(before_user, after_system);
        }
        let after_answer = between.strip_suffix(before_user)?;
        // Where both turns end alike, the end belongs to the message.
        let after_user = match (answer.strip_prefix(after_answer), end.strip_prefix(after_answer)) {
            (Some(_), Some(_)) => after_answer,
            _ => "",
        };
        let system = match with_system.as_deref() {
            Some([before, after, ..]) => {
                Some([before.to_string(), after.strip_suffix(before_user)?.to_string()])
            }
            _ => None,
        };
        let found = Wrappers {
            no_system: first.strip_suffix(before_user)?.into(),
            system,
            user: [before_user.into(), after_user.into()],
            assistant: [answer.strip_prefix(after_user)?.into(), after_answer.into()],
            generation: end.strip_prefix(after_user)?.into(),
        };
        Some(found.with_ends())
    }

    /// Where something always stands before the first message, the end of a message was found at the beginning of the
    /// next one: lines that all of them begin with are put back.
    fn with_ends(mut self) -> Wrappers {
        if self.no_system.is_empty() || !self.user[1].is_empty() || !self.assistant[1].is_empty() {
            return self;
        }
        let begins = [&self.user[0], &self.assistant[0], &self.generation];
        let is_shared = |end: &&str| begins.iter().all(|text| text.starts_with(*end));
        let lines = self.user[0].match_indices('\n').map(|(at, _)| &self.user[0][..=at]);
        let Some(end) = lines.rev().find(is_shared).map(str::to_owned) else { return self };
        for text in [&mut self.user[0], &mut self.assistant[0], &mut self.generation] {
            text.drain(..end.len());
        }
        let ends = [&mut self.no_system, &mut self.user[1], &mut self.assistant[1]];
        let ends = ends.into_iter().chain(self.system.iter_mut().map(|[_, after]| after));
        ends.for_each(|text| text.push_str(&end));
        self
    }

    fn pieces(&self) -> impl Iterator<Item = &String> {
        let system = self.system.iter().flatten();
        [&self.no_system, &self.generation]
            .into_iter()
            .chain(system)
            .chain(&self.user)
            .chain(&self.assistant)
    }

    /// What [`Wrappers::go`] gives for these messages.
    fn render(&self, messages: &[Message]) -> String {
        let mut text = String::new();
        if !messages.iter().any(|m| m.role == "system") {
            text += &self.no_system;
        }
        for Message { role, content } in messages {
            let around = match (role.as_str(), &self.system) {
                ("system", Some(system)) => system,
                ("system", None) => continue,
                ("user", _) => &self.user,
                _ => &self.assistant,
            };
            text += &format!("{}{content}{}", around[0], around[1]);
        }
        text + &self.generation
    }

    /// In Go's language, with the names that Ollama gives.
    fn go(&self) -> String {
        let mut text = String::new();
        if !self.no_system.is_empty() {
            text += &format!("{{{{ if not .System }}}}{}{{{{ end }}}}", self.no_system);
        }
        let message = |[before, after]: &[String; 2]| format!("{before}{{{{ .Content }}}}{after}");
        text += "{{ range .Messages }}";
        text += &format!("{{{{ if eq .Role \"user\" }}}}{}", message(&self.user));
        text += &format!("{{{{ else if eq .Role \"assistant\" }}}}{}", message(&self.assistant));
        if let Some(system) = &self.system {
            text += &format!("{{{{ else if eq .Role \"system\" }}}}{}", message(system));
        }
        text + "{{ end }}{{ end }}" + &self.generation
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vocabulary(bos: &str) -> Vocabulary<'static> {
        let tokens = vec!["<s>", "</s>", "<|im_end|>"];
        Vocabulary { tokens, bos: bos.into(), eos: "</s>".into(), adds_bos: true, ends: Vec::new() }
    }

    const CHATML: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

    #[test]
    fn chatml_is_said_in_gos_language() {
        let found = wrappers(CHATML, &vocabulary("")).unwrap();
        assert_eq!(
            found.go(),
            "{{ range .Messages }}{{ if eq .Role \"user\" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n\
             {{ else if eq .Role \"assistant\" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n\
             {{ else if eq .Role \"system\" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n{{ end }}{{ end }}\
             <|im_start|>assistant\n"
        );
    }

    #[test]
    fn a_default_system_message_and_bos_are_kept() {
        let default = format!(
            "{{{{ bos_token }}}}{{% if messages[0].role != 'system' %}}<|im_start|>system\nBe good.<|im_end|>\n{{% endif %}}{CHATML}"
        );
        let found = wrappers(&default, &vocabulary("<s>")).unwrap();
        assert_eq!(found.no_system, "<|im_start|>system\nBe good.<|im_end|>\n");
        assert_eq!(found.user, ["<|im_start|>user\n", "<|im_end|>\n"]);
        assert_eq!(found.assistant, ["<|im_start|>assistant\n", "<|im_end|>\n"]);
        assert!(!found.go().contains("<s>"), "the engine adds it: {found:?}");
    }

    #[test]
    fn what_cannot_be_said_is_left_out() {
        let dated = format!("{{{{ strftime_now('%d %b %Y') }}}}{CHATML}");
        let counted = "{% for m in messages %}{{ loop.index }}: {{ m.content }}\n{% endfor %}";
        for template in [dated.as_str(), counted] {
            assert!(wrappers(template, &vocabulary("")).is_err(), "{template}");
        }
    }

    #[test]
    fn a_system_message_may_stand_within_the_first_users() {
        // As Llama 2 has it.
        let merged = "{% for m in messages %}{% if m.role == 'user' %}[INST] {% if loop.index0 == 1 and messages[0].role == 'system' %}<<{{ messages[0].content }}>> {% endif %}{{ m.content }} [/INST]{% elif m.role == 'assistant' %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}";
        assert!(wrappers(merged, &vocabulary("")).is_ok());
    }

    #[test]
    fn without_system_messages_there_is_no_place_for_one() {
        let gemma = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}{{ '<start_of_turn>model\n' }}";
        let found = wrappers(gemma, &vocabulary("")).unwrap();
        assert_eq!(found.system, None);
        assert_eq!(found.generation, "<start_of_turn>model\n");
    }
}

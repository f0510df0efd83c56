//! `bupo-gguf verify`

use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

use clap::Args;

use super::print_json;
use crate::data::jsonl::{JsonLines, Row, kind};
use crate::reward::math::{self, Judgement, Mode, Rule};
use crate::{Error, Result};

/// Compares answers with gold answers, as the rewards `math`, `hendrycks` and `exact` do.
///
/// Rows are JSON lines: {"gold": "1/2", "answer": "0.5"}, or {"gold": "1/2", "completion": "so \boxed{0.5}"}
/// whose answer is looked for. One line per row goes to stdout: {"equal": true, "reason": ".."}.
///
/// Mode math compares by meaning: exactly, as numbers, formulas, sets, intervals, tuples, matrices, equations,
/// units, words. Mode hendrycks compares the text after the normalisation of the MATH data set, which the paper's
/// reward does; exact compares the text.
#[derive(Args)]
#[command(after_help = "Examples:
  bupo-gguf verify answers.jsonl
  echo '{\"gold\": \"1/2\", \"answer\": \"0.5\"}' | bupo-gguf verify --mode hendrycks")]
pub struct VerifyArgs {
    /// How answers are compared: math, hendrycks, exact
    #[arg(long, default_value = "math", value_name = "MODE", value_parser = |s: &str| Mode::parse(s))]
    mode: Mode,
    /// Where a completion's answer is looked for, in this order; thoughts (<think>..</think>) are no place
    /// [default: answer,boxed,fbox,bare,hashes,final,number for math; boxed,fbox,bare for hendrycks; all of the
    /// completion for exact]
    #[arg(long, value_name = "RULES")]
    extract: Option<String>,
    /// Print one object with the counts instead: {"rows": n, "equal": n, "mode": ".."}
    #[arg(long)]
    json: bool,
    /// Rows (JSON lines) [default: stdin]
    #[arg(value_name = "FILE")]
    file: Option<PathBuf>,
}

pub fn run(args: VerifyArgs) -> Result<()> {
    let rules = match &args.extract {
        Some(list) => Rule::parse_list(list)?,
        None => args.mode.rules().to_vec(),
    };
    let path = args.file.as_deref().unwrap_or(Path::new("stdin"));
    let reader: Box<dyn BufRead> = match &args.file {
        Some(file) => Box::new(BufReader::new(File::open(file).map_err(Error::io("read", file))?)),
        None => Box::new(std::io::stdin().lock()),
    };
    let mut out = BufWriter::new(std::io::stdout().lock());
    let (mut rows, mut equal) = (0usize, 0usize);
    for row in JsonLines::new(reader, path) {
        // What was judged before a bad row is written before the error.
        let judgement = row.and_then(|row| judge(&row, args.mode, &rules));
        let Judgement { equal: same, reason } = match judgement {
            Ok(judgement) => judgement,
            Err(error) => {
                out.flush().map_err(Error::io("write to", "stdout"))?;
                return Err(error);
            }
        };
        rows += 1;
        equal += usize::from(same);
        if !args.json {
            let line = serde_json::json!({"equal": same, "reason": reason});
            writeln!(out, "{line}").map_err(Error::io("write to", "stdout"))?;
        }
    }
    out.flush().map_err(Error::io("write to", "stdout"))?;
    drop(out);
    if args.json {
        let mode = args.mode.name();
        return print_json(&serde_json::json!({"rows": rows, "equal": equal, "mode": mode}));
    }
    Ok(())
}

fn judge(row: &Row, mode: Mode, rules: &[Rule]) -> Result<Judgement> {
    let text = |name: &str| {
        let value = row.get(name);
        value.map(|v| v.as_str().ok_or_else(|| row.invalid(name, "text", kind(v), "quote it")))
    };
    let missing = |name: &str| {
        row.invalid(name, "text", format!("a row with {}", row.keys()), "add the field")
    };
    let gold = text("gold").unwrap_or_else(|| Err(missing("gold")))?;
    match (text("answer").transpose()?, text("completion").transpose()?) {
        (Some(answer), None) => Ok(math::judge(gold, answer, mode)),
        (None, Some(completion)) => {
            let verdict = math::score(gold, completion, mode, rules);
            Ok(Judgement { equal: verdict.reward == 1.0, reason: verdict.reason })
        }
        (Some(_), Some(_)) => {
            Err(row.invalid("answer", "`answer` or `completion`", "both", "drop one of them"))
        }
        (None, None) => Err(missing("answer")),
    }
}

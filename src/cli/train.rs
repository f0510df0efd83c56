//! `bupo-gguf train`

use std::path::{Path, PathBuf};

use clap::{ArgMatches, Args};

use super::{print_json, print_line, stop_on_signal, watch::Show, watch::Watch};
use crate::analysis::report;
use crate::data::read_rollouts;
use crate::model::Model;
use crate::team::Team;
use crate::train::{Observer, Preset, Resume, RunConfig, Silent, Summary, TrainConfig, Trainer};
use crate::{Error, Result};

/// Train a LoRA adapter with BuPO, GRPO and their kin, with SFT, DPO or KTO, or after a teacher
///
/// Each step samples a group of completions for every prompt with llama.cpp under the live adapter,
/// rewards them, and updates the adapter: in the first --internal-steps steps so that the policy of an
/// inner layer improves (BuPO), then the model's own policy. The run folder gets config.toml,
/// metrics.jsonl, completions.jsonl, at the end summary.json, and adapter.gguf, which stock llama.cpp
/// loads with --lora.
///
/// --algo sft, dpo, kto, orpo and simpo learn from rows of --data, distill from a teacher's distributions over the
/// whole vocabulary, on rows with completions or on its own completions of prompts. With --internal-steps
/// each of them begins with the policy of an inner layer, too.
///
/// Every --checkpoint-every steps, at the end and at Ctrl-C the folder gets a checkpoint, from which
/// --resume goes on to the very adapter that the uninterrupted run would have given, also after a kill.
/// Settings given beside --resume replace the run's own; those that would break this need --allow-change.
#[derive(Args)]
#[command(after_help = "Rows of --data, where they are no problems:
  sft      {\"prompt\": .., \"completion\": ..} | {\"text\": ..}
           | {\"messages\": [..], \"tools\": [..]}   (the assistant's turns, calls of tools among them)
           | {\"prompt_tokens\": [..], \"completions\": [{\"tokens\": [..]}, ..]}
  dpo, orpo, simpo
           {\"prompt\": .., \"chosen\": .., \"rejected\": ..}
           | {\"prompt_tokens\": [..], \"chosen_tokens\": [..],
              \"rejected_tokens\": [..]}
  kto      {\"prompt\": .., \"completion\": .., \"label\": true|false}
  distill  {\"prompt\": ..}, or with completions as those of sft

Examples:
  bupo-gguf train demo
  bupo-gguf train Qwen3-4B-Q4_K_M.gguf --data problems.jsonl --dry-run
  bupo-gguf train Qwen3-4B-Q4_K_M.gguf --data problems.jsonl \\
      --eval-data held-out.jsonl --max-response 1024
  bupo-gguf train Qwen3-4B-Q4_K_M.gguf --config runs/old/config.toml --lr 2e-5
  bupo-gguf train Qwen3-4B-Q4_K_M.gguf --preset bupo-paper \\
      --data deepmath-5k.parquet --eval-data math500.parquet
  bupo-gguf train demo --algo bupo --objective gspo \\
      --reward \"boxed + 0.2*format\"
  bupo-gguf train m.gguf --algo sft --data answers.jsonl --epochs 2 --lr 1e-4
  bupo-gguf train m.gguf --algo dpo --data pairs.jsonl \\
      --adapter runs/m-sft-1/adapter.gguf --reference start
  bupo-gguf train m-q4_0.gguf --algo distill --teacher m-f16.gguf \\
      --data prompts.jsonl
  bupo-gguf train --resume runs/demo-bupo-1")]
pub struct TrainArgs {
    /// GGUF file, or `demo`; with --resume: where the model lies now, if not at its old place; with --config: another
    /// one than the file names
    #[arg(value_name = "MODEL", required_unless_present_any = ["resume", "settings_file"])]
    model: Option<PathBuf>,
    #[command(flatten)]
    config: TrainConfig,
    /// Go on with the run of this folder from its newest checkpoint; nothing else is needed
    #[arg(long, value_name = "DIR", conflicts_with_all = ["out", "rollouts"], help_heading = "Run")]
    resume: Option<PathBuf>,
    /// With --resume: go on with changed settings, model or data, although the adapter will not be the one
    /// of an uninterrupted run
    #[arg(long, requires = "resume", help_heading = "Run")]
    allow_change: bool,
    /// With several MPI ranks: go on although their processors differ, so that last bits depend on who computed what
    #[arg(long, help_heading = "Run")]
    allow_mixed: bool,
    /// Settings by name; options beside it stand. bupo-paper: the paper's reference runs, with LoRA instead of all
    /// weights; 0.6b, 1.7b, 4b, 8b: learning rate, batch and length for a model of about that many parameters
    #[arg(
        long,
        value_enum,
        value_name = "NAME",
        hide_possible_values = true,
        conflicts_with_all = ["resume", "settings_file"],
        help_heading = "Run"
    )]
    preset: Option<Preset>,
    /// Settings from a file as the config.toml of a run; options beside it stand
    #[arg(
        id = "settings_file",
        long = "config",
        value_name = "FILE",
        conflicts_with = "resume",
        help_heading = "Run"
    )]
    settings_file: Option<PathBuf>,
    /// Read model and data, settle every setting, plan the memory, print the settings, and stop: nothing is written
    #[arg(long, conflicts_with_all = ["resume", "rollouts", "dump_gradients"], help_heading = "Run")]
    dry_run: bool,
    /// Take these rows (JSON lines with prompt, completions and rewards) as the one step's rollouts
    /// instead of sampling
    #[arg(long, value_name = "FILE", help_heading = "Run")]
    rollouts: Option<PathBuf>,
    /// Write the gradients before clipping (safetensors): of --rollouts, or of all given rows as the one mini batch of
    /// --steps 1
    #[arg(long, value_name = "FILE", conflicts_with = "resume", help_heading = "Run")]
    dump_gradients: Option<PathBuf>,
    /// Show a completion, with its prompt, reward and reason, every N steps (0 = never); Enter shows one at any time
    #[arg(long, default_value_t = 10, value_name = "N", help_heading = "Run")]
    show_every: u64,
    /// Serve the run's page at http://127.0.0.1:PORT while it goes on, for this machine alone [default: 8321, or the
    /// next free one]
    #[arg(
        long,
        value_name = "PORT",
        num_args = 0..=1,
        conflicts_with_all = ["rollouts", "dry_run"],
        help_heading = "Run"
    )]
    serve: Option<Option<u16>>,
    /// Show nothing of the steps, only warnings and the summary
    #[arg(long, help_heading = "Run")]
    quiet: bool,
    /// One JSON object on stdout instead of the summary
    #[arg(long, help_heading = "Run")]
    json: bool,
}

impl TrainArgs {
    fn show(&self) -> Show {
        Show { quiet: self.quiet, every: self.show_every }
    }
}

pub fn run(mut args: TrainArgs, given: &ArgMatches, team: &Team) -> Result<()> {
    args.quiet |= !team.is_first();
    if let Some(folder) = &args.resume {
        let mut resume = Resume::open_in(folder, team)?;
        let settings = args.config.given(given)?;
        resume.change(args.model.clone(), &settings, args.allow_change)?;
        let model = Model::open_on(&resume.config().model, resume.config().train.placement()?)?;
        let mut trainer = resume.trainer_in(&model, team)?;
        let show = args.show();
        if !show.quiet {
            eprintln!("{}", trainer.plan().lines());
        }
        if args.allow_mixed {
            trainer.allow_mixed();
        }
        serve(args.serve.filter(|_| team.is_first()), folder)?;
        let run = |t: &mut Trainer<'_>, watch: &mut dyn Observer| t.run_on(resume, watch);
        return watched(&mut trainer, show, args.json, team, run);
    }
    if let Some(file) = &args.settings_file {
        let (model, config) = RunConfig::template(file, &args.config.given(given)?)?;
        args.model = args.model.or(model);
        args.config = config;
    }
    args.config.check()?;
    let Some(path) = args.model.as_deref() else {
        let place = args.settings_file.unwrap_or_default().display().to_string();
        let advice = "name the model before the options";
        return Err(Error::invalid(place, "a model", "none", advice));
    };
    let model = Model::open_on(path, args.config.placement()?)?;
    if let Some(preset) = args.preset {
        let applied = preset.apply(model.config(), &args.config.given(given)?)?;
        if team.is_first() {
            applied.notes.iter().for_each(|note| eprintln!("preset: {note}"));
        }
        args.config = applied.config;
        args.config.check()?;
    }
    if args.dry_run {
        let trainer = Trainer::in_team(&model, args.config, team)?;
        if !team.is_first() {
            return Ok(());
        }
        eprintln!("{}", trainer.plan().lines());
        trainer.notes().iter().for_each(|note| eprintln!("{note}"));
        let settings = RunConfig { model: path.into(), train: trainer.settings().written() };
        return match args.json {
            true => print_json(&settings),
            false => print_line(settings.text()?.trim_end()),
        };
    }
    if let Some(path) = &args.rollouts {
        let rows = read_rollouts(path)?;
        let mut trainer = Trainer::in_team(&model, args.config.clone(), team)?;
        say_frozen(&trainer);
        let dump = args.dump_gradients.as_deref().filter(|_| team.is_first());
        let replay = trainer.replay(&rows, dump)?;
        if !team.is_first() {
            return Ok(());
        }
        if let Some(out) = &args.config.out {
            trainer.save_to(out)?;
        }
        return print_json(&replay);
    }
    let out = args.config.out.clone().unwrap_or_else(|| default_out(path, &args.config));
    let show = args.show();
    let mut trainer = Trainer::in_team(&model, args.config, team)?;
    if !show.quiet {
        eprintln!("{}", trainer.plan().lines());
    }
    if let Some(path) = &args.dump_gradients {
        trainer.dump_gradients_to(path)?;
    }
    if args.allow_mixed {
        trainer.allow_mixed();
    }
    serve(args.serve.filter(|_| team.is_first()), &out)?;
    watched(&mut trainer, show, args.json, team, |t, watch| t.run(&out, watch))
}

/// Serves the run's page, where that is wanted, as long as the process lives.
fn serve(port: Option<Option<u16>>, folder: &Path) -> Result<()> {
    if let Some(port) = port {
        let (address, _) = report::serve(folder, port)?;
        eprintln!("page: {address}");
    }
    Ok(())
}

/// Says which pairs of the adapter take part and stay as they are.
fn say_frozen(trainer: &Trainer) {
    let frozen = trainer.lora().frozen();
    if !frozen.is_empty() {
        let names = frozen.join(", ");
        eprintln!("adapter: {names} applied and kept as it is, only attention and FFN are trained");
    }
}

/// Runs with a person watching, who may stop it, and prints the summary.
fn watched<'m>(
    trainer: &mut Trainer<'m>,
    show: Show,
    json: bool,
    team: &Team,
    run: impl FnOnce(&mut Trainer<'m>, &mut dyn Observer) -> Result<Summary>,
) -> Result<()> {
    stop_on_signal(trainer.stop_flag())?;
    if !team.is_first() {
        let summary = run(trainer, &mut Silent)?;
        return if summary.interrupted { Err(Error::Interrupted) } else { Ok(()) };
    }
    say_frozen(trainer);
    let mut watch = Watch::new(trainer, show);
    let summary = run(trainer, &mut watch)?;
    watch.finish();
    if json {
        print_json(&summary)?
    } else {
        print_line(&describe(&summary))?
    }
    if !summary.interrupted {
        return Ok(());
    }
    let folder = summary.adapter.parent().unwrap_or(Path::new("."));
    eprintln!("go on with it: bupo-gguf train --resume {}", folder.display());
    Err(Error::Interrupted)
}

/// `runs/<model>-<algo>-<seed>`, and where that is taken `..-2`, `..-3`
fn default_out(model: &Path, config: &TrainConfig) -> PathBuf {
    let model = model.file_stem().map_or("model".into(), |s| s.to_string_lossy());
    let first = format!("{model}-{}-{}", config.algo.name(), config.seed);
    let mut folder = Path::new("runs").join(&first);
    for n in 2.. {
        if !folder.read_dir().is_ok_and(|mut entries| entries.next().is_some()) {
            break;
        }
        folder.set_file_name(format!("{first}-{n}"));
    }
    folder
}

fn describe(summary: &Summary) -> String {
    let percent = |a: Option<f32>| {
        let text = a.map_or("not measured".into(), |a| format!("{:.1} %", 100.0 * a));
        ("accuracy", text)
    };
    let number = |l: Option<f64>| {
        let text = l.map_or("not measured".into(), |l| format!("{l:.4}"));
        ("loss    ", text)
    };
    let lift = match (summary.accuracy_before, summary.accuracy_after) {
        (Some(before), Some(after)) => format!(" ({:+.1} points)", 100.0 * (after - before)),
        _ => String::new(),
    };
    let ((word, before), (_, after)) = match summary.eval_loss_before {
        Some(_) => (number(summary.eval_loss_before), number(summary.eval_loss_after)),
        None => (percent(summary.accuracy_before), percent(summary.accuracy_after)),
    };
    let gpu = match (summary.gpu_peak_bytes, summary.gpu_planned_bytes) {
        (Some(used), Some(planned)) => {
            format!("\nGPU memory       {} MiB, {} MiB planned", used >> 20, planned >> 20)
        }
        _ => String::new(),
    };
    format!(
        "steps            {}\ntime             {:.0} s\npeak memory      {} MiB{gpu}\n{word} before  {before}\n{word} after   {after}{lift}\nadapter          {}",
        summary.steps,
        summary.seconds,
        summary.peak_bytes >> 20,
        summary.adapter.display(),
    )
}

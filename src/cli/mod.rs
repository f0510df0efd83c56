//! The command line: one file per subcommand, no logic.

mod bench;
mod completions;
mod diff;
mod entropy;
mod eval;
mod export;
mod generate;
mod import_peft;
mod inspect;
mod keys;
mod man;
mod report;
mod score;
mod synth;
mod train;
mod verify;
mod watch;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::{ArgMatches, Args, CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::ggml::DeviceChoice;
use crate::model::{Lora, Model, Placement};
use crate::team::Team;
use crate::{Error, Result};

/// Look inside quantised GGUF models and train LoRA adapters on them with Bottom-up Policy
/// Optimization (BuPO), on llama.cpp, with one copy of the weights.
///
/// MODEL is a GGUF file (of a split set the first part), or `demo` for the small model inside the program.
#[derive(Parser)]
#[command(version, max_term_width = 100, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// Each subcommand's help is the documentation of its arguments.
#[derive(Subcommand)]
enum Command {
    Train(Box<train::TrainArgs>),
    Entropy(Box<entropy::EntropyArgs>),
    Report(report::ReportArgs),
    Score(score::ScoreArgs),
    Generate(generate::GenerateArgs),
    Verify(verify::VerifyArgs),
    Synth(synth::SynthArgs),
    Bench(bench::BenchArgs),
    Eval(Box<eval::EvalArgs>),
    Export(Box<export::ExportArgs>),
    ImportPeft(import_peft::ImportPeftArgs),
    Diff(Box<diff::DiffArgs>),
    Inspect(inspect::InspectArgs),
    Completions(completions::CompletionsArgs),
    Man(man::ManArgs),
}

/// What every subcommand takes.
#[derive(Args, Clone, Debug)]
struct ModelArgs {
    /// GGUF file, or `demo`
    #[arg(value_name = "MODEL")]
    model: PathBuf,
}

/// Where to compute.
#[derive(Args, Clone, Debug)]
struct DeviceArgs {
    /// Where to compute: cpu, cuda (the first GPU), cuda:N, cuda:auto (one for each MPI rank
    /// of a machine), or auto; a GPU needs a build with `--features cuda`
    #[arg(long, default_value = "cpu", value_name = "DEVICE", help_heading = "Run")]
    device: DeviceChoice,
    /// On a GPU: layers, from the last one down, whose weights lie in its memory [default: all]
    #[arg(long, value_name = "N", help_heading = "Run")]
    gpu_layers: Option<usize>,
    /// On a GPU: multiply in F32 instead of F16
    #[arg(long, help_heading = "Run")]
    precise: bool,
}

impl DeviceArgs {
    fn open(&self, model: &ModelArgs) -> Result<Model> {
        self.open_file(&model.model)
    }

    fn open_file(&self, path: &Path) -> Result<Model> {
        let device = self.device.resolve(self.precise)?;
        Model::open_on(path, Placement { device, gpu_layers: self.gpu_layers })
    }
}

/// An adapter beside a model.
fn open_adapter(model: &Model, path: &Option<PathBuf>) -> Result<Option<Lora>> {
    path.as_ref().map(|path| Lora::load(model, path)).transpose()
}

/// Parses the arguments of the process and runs the subcommand.
pub fn run() -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_env("BUPO_LOG"))
        .with_writer(std::io::stderr)
        .init();
    if let Err(error) = crate::ggml::check_processor() {
        eprintln!("error: {error}");
        return ExitCode::FAILURE;
    }
    let matches = command().get_matches();
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|e| e.exit());
    let given = matches.subcommand().map_or(&matches, |(_, given)| given);
    let outcome = Team::started().and_then(|team| {
        let outcome = match shares(&cli.command) || team.is_alone() {
            true => subcommand(cli.command, given, &team),
            false => {
                let advice = "start it alone; train, eval and entropy run on several ranks";
                let (expected, got) = ("one process", format!("{} ranks", team.size()));
                let name = matches.subcommand_name().unwrap_or_default();
                Err(team.shared_by_all(Error::invalid(name, expected, got, advice)))
            }
        };
        let tell =
            |error: &Error, who: &str| eprintln!("error: {who}: {}", one_line(&error.to_string()));
        let outcome = team.end(outcome, tell);
        // The first rank tells what they all know.
        if team.is_first() { outcome } else { Ok(()) }
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(Error::Interrupted) => {
            eprintln!("interrupted");
            ExitCode::from(130)
        }
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::BrokenPipe => {
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("error: {}", one_line(&error.to_string()));
            ExitCode::FAILURE
        }
    }
}

/// Whether the ranks of a team share the work of a subcommand.
fn shares(command: &Command) -> bool {
    matches!(command, Command::Train(_) | Command::Entropy(_) | Command::Eval(_))
}

fn subcommand(command: Command, given: &ArgMatches, team: &Team) -> Result<()> {
    match command {
        Command::Train(args) => train::run(*args, given, team),
        Command::Entropy(args) => entropy::run(*args, team),
        Command::Report(args) => report::run(args),
        Command::Score(args) => score::run(args),
        Command::Generate(args) => generate::run(args),
        Command::Verify(args) => verify::run(args),
        Command::Synth(args) => synth::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Eval(args) => eval::run(*args, team),
        Command::Export(args) => export::run(*args),
        Command::ImportPeft(args) => import_peft::run(args),
        Command::Diff(args) => diff::run(*args),
        Command::Inspect(args) => inspect::run(args),
        Command::Completions(args) => completions::run(args),
        Command::Man(args) => man::run(args),
    }
}

/// The command line, whose options all take a number below zero for their value: what is wrong with it is said by name.
fn command() -> clap::Command {
    let numbers = |command: clap::Command| {
        command.mut_args(|arg| match arg.get_action().takes_values() {
            true => arg.allow_negative_numbers(true),
            false => arg,
        })
    };
    Cli::command().mut_subcommands(numbers)
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Ctrl-C or SIGTERM sets the flag; a second one ends the process at once.
fn stop_on_signal(flag: Arc<AtomicBool>) -> Result<()> {
    ctrlc::set_handler(move || {
        if flag.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
        eprintln!("\nstopping before the next step (once more to stop at once)");
    })
    .map_err(|e| Error::engine("catching Ctrl-C", e.to_string(), "report it"))
}

/// Runs `work` with that many threads of its own, or one per core.
fn in_pool<T: Send>(threads: Option<usize>, work: impl FnOnce() -> T + Send) -> Result<T> {
    let threads = threads.unwrap_or_else(crate::ggml::usable_cores);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    let pool =
        pool.map_err(|e| Error::engine("starting threads", e.to_string(), "try --threads 1"))?;
    Ok(pool.install(work))
}

/// Writes a line of JSON to stdout.
fn print_json(value: &impl serde::Serialize) -> Result<()> {
    let text = serde_json::to_string(value)
        .map_err(|e| Error::engine("writing JSON", e.to_string(), "report it"))?;
    print_line(&text)
}

/// Writes a line to stdout; a closed pipe is an error, not a panic.
fn print_line(text: &str) -> Result<()> {
    use std::io::Write;
    writeln!(std::io::stdout(), "{text}").map_err(Error::io("write to", "stdout"))
}

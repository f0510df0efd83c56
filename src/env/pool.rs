//! Environments on threads of their own, and the dialogues of one call with them.

use std::collections::{BTreeSet, HashMap};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread::JoinHandle;
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, unbounded};
use serde_json::{Value, json};

use super::talk::{Dialogue, Heard, TurnEnd};
use super::{CallFormat, EnvOptions, Environment, Opening, Step, Task, Turn};
use crate::rollout::{Answer, Conversation, Encoder, Finish, Partner, Request, Segment, Which};
use crate::team::Team;
use crate::{Error, Result};

/// Threads with an environment each. A dialogue stays with one of them.
pub struct EnvPool {
    options: EnvOptions,
    workers: Vec<Sender<Job>>,
    results: Receiver<Done>,
    threads: Vec<JoinHandle<()>>,
    calls: u64,
}

struct Job {
    call: u64,
    which: Which,
    dialogue: String,
    ask: Ask,
}

enum Ask {
    Reset(Box<Task>),
    Step(Box<Turn>),
    Close,
}

struct Done {
    call: u64,
    which: Which,
    reply: Result<Reply>,
    seconds: f64,
}

enum Reply {
    Opened(Opening),
    Stepped(Step),
    Closed,
}

impl EnvPool {
    /// As many as the options say, started.
    ///
    /// # Errors
    /// There is no such environment, or its program cannot be started.
    pub fn new(options: &EnvOptions) -> Result<EnvPool> {
        let (done, results) = unbounded();
        let (mut workers, mut threads) = (Vec::new(), Vec::new());
        for _ in 0..options.env_workers.max(1) {
            let mut environment = options.environment()?;
            environment.start()?;
            let (jobs, todo) = unbounded::<Job>();
            let done = done.clone();
            workers.push(jobs);
            threads.push(std::thread::spawn(move || {
                for job in todo {
                    let start = Instant::now();
                    let reply = work(environment.as_mut(), &job);
                    let seconds = start.elapsed().as_secs_f64();
                    let Job { call, which, .. } = job;
                    if done.send(Done { call, which, reply, seconds }).is_err() {
                        return;
                    }
                }
            }));
        }
        Ok(EnvPool { options: options.clone(), workers, results, threads, calls: 0 })
    }

    /// What it was made by.
    pub fn options(&self) -> &EnvOptions {
        &self.options
    }

    /// Dialogues about these tasks, `n` about each, whose names begin with `name`; each task is opened once.
    ///
    /// # Errors
    /// An environment that cannot open a dialogue, or messages that the chat template refuses.
    pub fn session<'s, 'm>(
        &'s mut self,
        encoder: &'s Encoder<'m>,
        tasks: Vec<Task>,
        n: usize,
        name: &str,
    ) -> Result<Session<'s, 'm>> {
        let named = (0..).zip(tasks).map(|(i, task)| (format!("{name}.{i}"), task)).collect();
        self.session_in(&Team::alone(), encoder, named, n)
    }

    /// [`EnvPool::session`] of a team, with a name for each task's dialogues; all ranks make the same one. A rank opens its
    /// share of the tasks, and all know all openings.
    ///
    /// # Errors
    /// Those of any rank.
    pub fn session_in<'s, 'm>(
        &'s mut self,
        team: &Team,
        encoder: &'s Encoder<'m>,
        tasks: Vec<(String, Task)>,
        n: usize,
    ) -> Result<Session<'s, 'm>> {
        self.calls += 1;
        let format = self.options.tool_format;
        let format = format.unwrap_or_else(|| CallFormat::of_template(encoder.template_source()));
        let (names, tasks) = tasks.into_iter().unzip();
        let mut session = Session {
            pool: self,
            encoder,
            format,
            n,
            names,
            tasks,
            openings: Vec::new(),
            talks: HashMap::new(),
            open: BTreeSet::new(),
            arrived: HashMap::new(),
            watcher: None,
            ended: None,
            groups: HashMap::new(),
            waited_s: 0.0,
            worked_s: 0.0,
            anew: 0,
        };
        session.open(team)?;
        Ok(session)
    }

    fn send(&self, job: Job) -> Result<()> {
        let worker = (job.which.request * 31 + job.which.index) % self.workers.len();
        self.workers[worker].send(job).map_err(|_| lost())
    }
}

impl Drop for EnvPool {
    fn drop(&mut self) {
        self.workers.clear();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn work(environment: &mut dyn Environment, job: &Job) -> Result<Reply> {
    let run = || match &job.ask {
        Ask::Reset(task) => environment.reset(&job.dialogue, task).map(Reply::Opened),
        Ask::Step(turn) => environment.step(&job.dialogue, turn).map(Reply::Stepped),
        Ask::Close => environment.close(&job.dialogue).map(|()| Reply::Closed),
    };
    // One that panics must not leave the run waiting for its answer.
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| {
        let reason = format!("it panicked in dialogue {}", job.dialogue);
        Err(Error::engine("the environment", reason, "report it"))
    })
}

fn lost() -> Error {
    Error::engine("talking to an environment", "its thread has ended early", "report it")
}

/// An opened task: its messages and tools, and both as tokens.
struct Opened {
    opening: Opening,
    conversation: Conversation,
    prompt: Vec<i32>,
}

/// A dialogue under way.
struct Talk {
    conversation: Conversation,
    begun: Instant,
    /// Whether its environment was asked to begin it.
    is_open: bool,
    /// The turn that was said last, and its tokens.
    turn: Turn,
    tokens: Vec<i32>,
    /// Whether its environment was asked about that.
    asked: bool,
    ends: Vec<TurnEnd>,
    calls: usize,
    failed: usize,
    success: Option<bool>,
    reason: String,
    truncated: bool,
}

/// What becomes of a task's dialogues when all of them are over.
pub type Ended<'e> = dyn FnMut(usize, Vec<Dialogue>) -> Result<()> + 'e;

/// The dialogues of one call.
pub struct Session<'s, 'm> {
    pool: &'s mut EnvPool,
    encoder: &'s Encoder<'m>,
    format: CallFormat,
    n: usize,
    names: Vec<String>,
    tasks: Vec<Task>,
    openings: Vec<Opened>,
    talks: HashMap<Which, Talk>,
    /// Dialogues that environments hold.
    open: BTreeSet<Which>,
    /// Replies that nobody has waited for yet.
    arrived: HashMap<Which, Vec<Reply>>,
    watcher: Option<&'s mut dyn FnMut(Heard<'_>)>,
    ended: Option<&'s mut Ended<'s>>,
    /// Of groups that are not over yet the dialogues that are, where groups are handed on.
    groups: HashMap<usize, Vec<(usize, Dialogue)>>,
    /// Time that sampling stood still, and that environments worked.
    waited_s: f64,
    worked_s: f64,
    anew: usize,
}

impl<'s> Session<'s, '_> {
    /// Opens each task's first dialogue.
    fn open(&mut self, team: &Team) -> Result<()> {
        let n = self.tasks.len();
        let own: Vec<usize> = (team.rank()..n).step_by(team.size()).collect();
        for opening in team.join(n, self.open_these(&own))? {
            let encoded = self.encoder.open(&opening.messages, &opening.tools);
            let (conversation, prompt) = encoded.map_err(|e| team.shared_by_all(e))?;
            self.openings.push(Opened { opening, conversation, prompt });
        }
        Ok(())
    }

    fn open_these(&mut self, requests: &[usize]) -> Result<Vec<(usize, Opening)>> {
        for &request in requests {
            let task = Box::new(self.tasks[request].clone());
            self.ask(Which { request, index: 0 }, Ask::Reset(task))?;
        }
        let mut opened = Vec::with_capacity(requests.len());
        for &request in requests {
            let reply = self.reply(Which { request, index: 0 })?;
            let Reply::Opened(opening) = reply else { return Err(lost()) };
            opened.push((request, opening));
        }
        Ok(opened)
    }

    /// Shows what environments say, of a session with one dialogue.
    pub fn watch(&mut self, watcher: &'s mut dyn FnMut(Heard<'_>)) {
        self.watcher = Some(watcher);
    }

    /// Hands each group of dialogues on as it ends, with the number of its task; [`Session::dialogues`] then has none.
    pub fn hand_on(&mut self, ended: &'s mut Ended<'s>) {
        self.ended = Some(ended);
    }

    /// Tokens of each opening.
    pub fn lengths(&self) -> impl Iterator<Item = usize> + '_ {
        self.openings.iter().map(|opened| opened.prompt.len())
    }

    /// What each task's dialogues begin with.
    pub fn opening(&self, request: usize) -> &[Value] {
        &self.openings[request].opening.messages
    }

    /// What is to be sampled, a request for each task; random numbers by `streams`.
    ///
    /// # Errors
    /// [`Error::Invalid`] for an opening of more than `max_prompt` tokens: none of it can be left out.
    pub fn requests(
        &self,
        max_prompt: usize,
        max_tokens: usize,
        streams: impl Iterator<Item = u64>,
    ) -> Result<Vec<Request>> {
        let opened = self.openings.iter().zip(&self.tasks).zip(streams);
        opened
            .map(|((opened, task), seed_stream)| {
                let prompt_tokens = opened.prompt.clone();
                if prompt_tokens.len() > max_prompt {
                    return Err(Error::invalid(
                        format!("the opening of {}", task.problem.source),
                        format!("at most --max-prompt ({max_prompt} tokens)"),
                        prompt_tokens.len().to_string(),
                        "raise it, or let the environment say less",
                    ));
                }
                Ok(Request { prompt_tokens, n: self.n, seed_stream, max_tokens })
            })
            .collect()
    }

    /// Seconds that sampling stood still, and that environments worked.
    pub fn seconds(&self) -> (f64, f64) {
        (self.waited_s, self.worked_s)
    }

    /// Times that the chat template wrote what was said before otherwise.
    pub fn rewritten(&self) -> usize {
        self.anew
    }

    /// The dialogues, of the segments that [`crate::rollout::Rollouts::converse`] gave, with the numbers of their tasks.
    pub fn dialogues(
        mut self,
        segments: Vec<(usize, Vec<Vec<Segment>>)>,
    ) -> Vec<(usize, Vec<Dialogue>)> {
        let mut group = |request: usize, group: Vec<Vec<Segment>>| {
            let all = group.into_iter().enumerate();
            let talk = |(index, segments)| self.dialogue(Which { request, index }, segments);
            (request, all.map(talk).collect())
        };
        segments.into_iter().map(|(request, segments)| group(request, segments)).collect()
    }

    /// One that is over.
    fn dialogue(&mut self, which: Which, segments: Vec<Segment>) -> Dialogue {
        let talk = self.talks.remove(&which).expect("it was sampled");
        let sum: f32 = talk.ends.iter().map(|end| end.reward).sum();
        Dialogue {
            segments,
            messages: talk.conversation.messages().cloned().collect(),
            success: talk.success.unwrap_or(sum >= 1.0),
            turns: talk.ends,
            calls: talk.calls,
            failed: talk.failed,
            reason: talk.reason,
            truncated: talk.truncated,
        }
    }

    fn ask(&mut self, which: Which, ask: Ask) -> Result<()> {
        match &ask {
            Ask::Reset(_) => drop(self.open.insert(which)),
            Ask::Close => drop(self.open.remove(&which)),
            Ask::Step(_) => {}
        }
        let dialogue = format!("{}.{}", self.names[which.request], which.index);
        self.pool.send(Job { call: self.pool.calls, which, dialogue, ask })
    }

    /// The next reply in a dialogue; waits for it.
    fn reply(&mut self, which: Which) -> Result<Reply> {
        loop {
            if let Some(replies) = self.arrived.get_mut(&which).filter(|r| !r.is_empty()) {
                return Ok(replies.remove(0));
            }
            let done = match self.pool.results.try_recv() {
                Ok(done) => done,
                Err(_) => {
                    let start = Instant::now();
                    let done = self.pool.results.recv().map_err(|_| lost())?;
                    self.waited_s += start.elapsed().as_secs_f64();
                    done
                }
            };
            // Else left over from a call that ended with an error.
            if done.call == self.pool.calls {
                self.worked_s += done.seconds;
                match done.reply? {
                    Reply::Closed => {}
                    reply => self.arrived.entry(done.which).or_default().push(reply),
                }
            }
        }
    }

    /// What the environment says to the turn that was asked about.
    fn step(&mut self, which: Which) -> Result<Step> {
        loop {
            match self.reply(which)? {
                Reply::Opened(opening) if opening != self.openings[which.request].opening => {
                    let expected = "the same opening for every dialogue about a problem";
                    let words = |o: &Opening| {
                        let last = o.messages.last().map_or(String::new(), Value::to_string);
                        crate::data::jsonl::shorten(&last, 80)
                    };
                    let first = &self.openings[which.request].opening;
                    let got = format!("{} and then {}", words(first), words(&opening));
                    let advice = "let chance depend on the `seed` of the reset alone";
                    return Err(Error::invalid("--env", expected, got, advice));
                }
                Reply::Opened(_) | Reply::Closed => {}
                Reply::Stepped(step) => return Ok(step),
            }
        }
    }
}

impl Drop for Session<'_, '_> {
    fn drop(&mut self) {
        for which in std::mem::take(&mut self.open) {
            // A thread that has ended is noticed by whoever waits for it.
            let _ = self.ask(which, Ask::Close);
        }
    }
}

/// What the model reads of calls that cannot be made. Mistral's templates have no results without calls.
fn complaints(turn: &Turn, format: CallFormat) -> Vec<Value> {
    let role = if format == CallFormat::Mistral { "user" } else { "tool" };
    let one = |why: &String| json!({"role": role, "content": format!("error: {why}")});
    turn.malformed.iter().map(one).collect()
}

impl Partner for Session<'_, '_> {
    fn lag(&self) -> u64 {
        self.pool.options.lag()
    }

    fn max_turn(&self, _which: Which) -> usize {
        self.pool.options.max_turn_tokens.unwrap_or(usize::MAX)
    }

    fn began(&mut self, which: Which) {
        let talk = Talk {
            conversation: self.openings[which.request].conversation.clone(),
            begun: Instant::now(),
            is_open: self.open.contains(&which),
            turn: Turn::default(),
            tokens: Vec::new(),
            asked: false,
            ends: Vec::new(),
            calls: 0,
            failed: 0,
            success: None,
            reason: String::new(),
            truncated: false,
        };
        self.talks.insert(which, talk);
    }

    fn said(&mut self, which: Which, tokens: &[i32], finish: Finish) -> Result<()> {
        let options = &self.pool.options;
        let (turns, seconds) = (options.max_turns, options.max_dialogue_seconds);
        let text = self.encoder.said(tokens);
        let mut turn = self.format.read(&text, &self.openings[which.request].opening.tools);
        let talk = self.talks.get_mut(&which).expect("it began");
        turn.number_calls(talk.calls);
        turn.number = talk.ends.len() + 1;
        turn.truncated = finish == Finish::Length;
        let late = seconds > 0.0 && talk.begun.elapsed().as_secs_f32() > seconds;
        turn.last = turn.truncated || late || turn.number >= turns;
        talk.calls += turn.calls.len() + turn.malformed.len();
        talk.failed += turn.malformed.len();
        // A turn of malformed calls alone is answered here; the environment never hears of it.
        talk.asked = turn.last || turn.malformed.is_empty() || !turn.calls.is_empty();
        (talk.turn, talk.tokens) = (turn.clone(), tokens.to_vec());
        if talk.asked {
            let opens = !std::mem::replace(&mut talk.is_open, true);
            if opens {
                let task = self.tasks[which.request].clone();
                self.ask(which, Ask::Reset(Box::new(task)))?;
            }
            self.ask(which, Ask::Step(Box::new(turn)))?;
        }
        Ok(())
    }

    fn answer(&mut self, which: Which) -> Result<Answer> {
        let step = match self.talks[&which].asked {
            true => self.step(which)?,
            false => Step::default(),
        };
        if let Some(watcher) = &mut self.watcher {
            let over = step.done || self.talks[&which].turn.last;
            watcher(Heard { messages: &step.messages, over });
        }
        let talk = self.talks.get_mut(&which).expect("it began");
        let errors = |m: &&Value| {
            m["role"] == "tool" && m["content"].as_str().is_some_and(|c| c.starts_with("error"))
        };
        talk.failed += step.messages.iter().filter(errors).count();
        talk.ends.push(TurnEnd { reward: step.reward });
        let read = talk.turn.message();
        if step.done || talk.turn.last {
            talk.truncated = talk.turn.truncated || !step.done;
            (talk.success, talk.reason) = (step.success, step.reason);
            let text = talk.turn.text.clone();
            talk.conversation.end(&text, read);
            talk.conversation.tell(step.messages);
            self.ask(which, Ask::Close)?;
            return Ok(Answer::Over);
        }
        let messages = [step.messages, complaints(&talk.turn, self.format)].concat();
        let answer = self.encoder.go_on(&mut talk.conversation, &talk.tokens, read, messages)?;
        self.anew += matches!(answer, Answer::Anew(_)) as usize;
        Ok(answer)
    }

    fn cut(&mut self, which: Which) {
        if let Some(talk) = self.talks.get_mut(&which) {
            talk.truncated = true;
            talk.reason = "no room for the environment's answer".into();
        }
        let _ = self.ask(which, Ask::Close);
    }

    fn finished(&mut self, which: Which, segments: &[Segment]) -> Result<()> {
        if self.ended.is_none() {
            return Ok(());
        }
        let dialogue = self.dialogue(which, segments.to_vec());
        let group = self.groups.entry(which.request).or_default();
        group.push((which.index, dialogue));
        if group.len() < self.n {
            return Ok(());
        }
        let mut group = self.groups.remove(&which.request).unwrap_or_default();
        group.sort_by_key(|(index, _)| *index);
        let group = group.into_iter().map(|(_, dialogue)| dialogue).collect();
        self.ended.as_mut().map_or(Ok(()), |ended| ended(which.request, group))
    }
}

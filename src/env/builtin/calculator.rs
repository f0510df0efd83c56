//! `env:calculator`: a problem, and a tool that computes.

use std::collections::HashMap;

use serde_json::{Value, json};

use super::{asked, compute, unknown};
use crate::Result;
use crate::data::Problem;
use crate::env::{Environment, Opening, Step, Task, Turn};
use crate::reward::{Reward, math::Rule};

/// Its dialogues and their problems.
#[derive(Default)]
pub(super) struct Calculator {
    problems: HashMap<String, Problem>,
}

impl Environment for Calculator {
    fn reset(&mut self, dialogue: &str, task: &Task) -> Result<Opening> {
        let messages = asked(task)?;
        self.problems.insert(dialogue.into(), task.problem.clone());
        let tool = json!({"type": "function", "function": {
            "name": "calculator",
            "description": "Computes an arithmetic expression.",
            "parameters": {
                "type": "object",
                "properties": {"expression": {"type": "string"}},
                "required": ["expression"],
            },
        }});
        Ok(Opening { messages, tools: vec![tool] })
    }

    /// A call is computed; a turn without one is the answer, and right by the rule `math`.
    fn step(&mut self, dialogue: &str, turn: &Turn) -> Result<Step> {
        let problem = self.problems.get(dialogue).ok_or_else(|| unknown(dialogue))?;
        if turn.truncated || (turn.last && !turn.calls.is_empty()) {
            let reason = "no answer within the limits".into();
            return Ok(Step { done: true, success: Some(false), reason, ..Step::default() });
        }
        if turn.calls.is_empty() {
            let said = Reward::Math(Rule::ALL.to_vec()).score(problem, &turn.content)?;
            return Ok(Step {
                reward: said.reward,
                done: true,
                success: Some(said.reward >= 1.0),
                reason: said.reason,
                ..Step::default()
            });
        }
        let result = |call: &crate::env::ToolCall| -> Value {
            let expression = call.arguments["expression"].as_str().unwrap_or_default();
            let content = compute(expression).unwrap_or_else(|why| format!("error: {why}"));
            json!({"role": "tool", "name": call.name, "tool_call_id": call.id, "content": content})
        };
        Ok(Step { messages: turn.calls.iter().map(result).collect(), ..Step::default() })
    }

    fn close(&mut self, dialogue: &str) -> Result<()> {
        self.problems.remove(dialogue);
        Ok(())
    }
}

use super::*;

fn tools() -> Vec<Value> {
    vec![
        json!({"type": "function", "function": {"name": "calculator", "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string"}, "digits": {"type": "integer"}},
            "required": ["expression"]}}}),
        json!({"type": "function", "function": {"name": "now", "parameters": {}}}),
    ]
}

fn read(format: CallFormat, text: &str) -> Turn {
    format.read(text, &tools())
}

#[test]
fn every_format_is_read() {
    use CallFormat::*;
    for (format, text, content) in [
        (
            Hermes,
            "a <tool_call>\n{\"name\": \"calculator\", \"arguments\": {\"expression\": \"1+2\"}}\n</tool_call>",
            "a",
        ),
        (
            Hermes,
            "<tool_call>{\"name\": \"calculator\", \"arguments\": \"{\\\"expression\\\": \\\"1+2\\\"}\"}",
            "",
        ),
        (
            QwenCoder,
            "<tool_call>\n<function=calculator>\n<parameter=expression>\n1+2\n</parameter>\n</function>\n</tool_call>",
            "",
        ),
        (
            Llama3,
            "<|python_tag|>{\"name\": \"calculator\", \"parameters\": {\"expression\": \"1+2\"}}",
            "",
        ),
        (Llama3, " {\"name\": \"calculator\", \"parameters\": {\"expression\": \"1+2\"}}", ""),
        (Llama3, "<|python_tag|>calculator.call(expression=\"1+2\")", ""),
        (
            Mistral,
            "a[TOOL_CALLS][{\"name\": \"calculator\", \"arguments\": {\"expression\": \"1+2\"}}]",
            "a",
        ),
        (Mistral, "[TOOL_CALLS]calculator[ARGS]{\"expression\": \"1+2\"}", ""),
        (Mistral, "[TOOL_CALLS]calculator[CALL_ID]x[ARGS]{\"expression\": \"1+2\"}", ""),
        (Gemma, "a\n```tool_code\ncalculator(expression='1+2')\n```", "a"),
        (Gemma, "```tool_code\nprint(calculator(expression=\"1+2\"))\n```", ""),
        (
            Gemma,
            "```json\n{\"name\": \"calculator\", \"parameters\": {\"expression\": \"1+2\"}}\n```",
            "",
        ),
        (Gemma, "[{\"name\": \"calculator\", \"parameters\": {\"expression\": \"1+2\"}}]", ""),
        (
            Gemma,
            "<start_function_call>call:calculator{expression:<escape>1+2<escape>}<end_function_call>",
            "",
        ),
        (Gemma, "<|tool_call>call:calculator{expression:<|\"|>1+2<|\"|>}<tool_call|>", ""),
        (
            GptOss,
            "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary to=functions.calculator <|constrain|>json<|message|>{\"expression\": \"1+2\"}",
            "",
        ),
        (
            GptOss,
            " to=functions.calculator<|channel|>commentary json<|message|>{\"expression\": \"1+2\"}<|call|>",
            "",
        ),
    ] {
        let turn = read(format, text);
        assert_eq!(turn.calls.len(), 1, "{text}: {turn:?}");
        assert_eq!(turn.calls[0].name, "calculator", "{text}");
        assert_eq!(turn.calls[0].arguments["expression"], "1+2", "{text}");
        assert_eq!((turn.content.as_str(), turn.malformed.len()), (content, 0), "{text}");
    }
}

#[test]
fn several_calls_in_one_turn() {
    use CallFormat::*;
    let one = "{\"name\": \"calculator\", \"arguments\": {\"expression\": \"1\"}}";
    for (format, text) in [
        (
            Hermes,
            format!("<tool_call>{one}</tool_call>\n<tool_call>{{\"name\": \"now\"}}</tool_call>"),
        ),
        (Llama3, format!("<|python_tag|>{one}; {{\"name\": \"now\"}}")),
        (Mistral, format!("[TOOL_CALLS][{one}, {{\"name\": \"now\"}}]")),
        (Mistral, "[TOOL_CALLS]calculator{\"expression\": \"1\"}[TOOL_CALLS]now{}".into()),
        (Gemma, "```tool_code\ncalculator(expression=\"1\")\nnow()\n```".into()),
    ] {
        let mut turn = read(format, &text);
        turn.number_calls(4);
        let names: Vec<_> = turn.calls.iter().map(|c| (c.name.as_str(), c.id.as_str())).collect();
        assert_eq!(names, [("calculator", "call00004"), ("now", "call00005")], "{text}: {turn:?}");
    }
}

#[test]
fn what_cannot_be_called_is_said() {
    use CallFormat::*;
    for (format, text, why) in [
        (Hermes, "<tool_call>{\"name\": </tool_call>", "is no JSON"),
        (Hermes, "<tool_call>[]</tool_call>", "has no `name`"),
        (
            Hermes,
            "<tool_call>{\"name\": \"calculator\", \"arguments\": 3}</tool_call>",
            "no JSON object",
        ),
        (
            Hermes,
            "<tool_call>{\"name\": \"calc\"}</tool_call>",
            "there is no tool \"calc\"; there are calculator, now",
        ),
        (
            Hermes,
            "<tool_call>{\"name\": \"calculator\"}</tool_call>",
            "lacks the argument \"expression\"",
        ),
        (
            Hermes,
            "<tool_call>{\"name\": \"calculator\", \"arguments\": {\"expression\": 3}}</tool_call>",
            "not of type \"string\"",
        ),
        (QwenCoder, "<tool_call>calculator</tool_call>", "no <function=NAME>"),
        (Llama3, "{\"name\": \"calculator\"", "is no JSON"),
        (Llama3, "<|python_tag|>import os", "is no call"),
        (Mistral, "[TOOL_CALLS][{\"name\"", "is no JSON"),
        (Mistral, "[TOOL_CALLS]calculator", "no name with a JSON object"),
        (Gemma, "```tool_code\nx = 3\n```", "is no call"),
        (Gemma, "<start_function_call>calculator<end_function_call>", "is no call"),
        (GptOss, "<|channel|>commentary to=functions.calculator<|message|>1+2", "no JSON object"),
    ] {
        let turn = read(format, text);
        assert_eq!((turn.calls.len(), turn.malformed.len()), (0, 1), "{text}: {turn:?}");
        assert!(turn.malformed[0].contains(why), "{text}: {:?}", turn.malformed);
    }
}

#[test]
fn answers_are_no_calls() {
    use CallFormat::*;
    for format in [Hermes, QwenCoder, Llama3, Mistral, Gemma, GptOss] {
        for text in ["\\boxed{3}", "", "it is {\"x\": 1}", "a (b) = c"] {
            let turn = read(format, text);
            assert_eq!(
                (turn.content.as_str(), turn.calls.len() + turn.malformed.len()),
                (text, 0),
                "{format:?}"
            );
        }
    }
    let turn = read(
        GptOss,
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>3",
    );
    assert_eq!((turn.thoughts.as_deref(), turn.content.as_str()), (Some("hm"), "3"));
    for (text, thoughts, content) in
        [("<think>\na</think>b", "a", "b"), ("a</think>b", "a", "b"), ("<think>a", "a", "")]
    {
        let turn = read(Hermes, text);
        assert_eq!((turn.thoughts.as_deref(), turn.content.as_str()), (Some(thoughts), content));
    }
}

#[test]
fn the_template_tells_the_format() {
    use CallFormat::*;
    for (source, format) in [
        ("<|im_start|><tool_call>", Hermes),
        ("<tool_call><function=", QwenCoder),
        ("<|start_header_id|>ipython", Llama3),
        ("[TOOL_CALLS]", Mistral),
        ("<start_of_turn>", Gemma),
        ("<|channel|>", GptOss),
        ("<|im_start|>", Hermes),
    ] {
        assert_eq!(CallFormat::of_template(source), format);
    }
}

#[test]
fn nested_and_hostile_literals_end() {
    let deep = format!("f(x={}", "[".repeat(100_000));
    assert!(literal::call(&deep).is_err());
    let (_, arguments) =
        literal::call("f(a=[1, -2.5, {'k': None}], b=\"\\\"\\n\", c=True,)").unwrap();
    assert_eq!(
        Value::Object(arguments),
        json!({"a": [1, -2.5, {"k": null}], "b": "\"\n", "c": true})
    );
}

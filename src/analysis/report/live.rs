//! A run's page while it goes on: served on this machine alone, renewed by server-sent events.
//!
//! | path | answer |
//! |---|---|
//! | `/` | the page of `report` |
//! | `/parts` | its body, for what is new |
//! | `/events` | one event as soon as a step is new; its id is what the browser has seen when it asks again |

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::time::{Duration, Instant};

use oxhttp::model::{Body, Request, Response, StatusCode};
use oxhttp::{ListeningServer, Server};

use super::page::Page;
use super::training::of_run;
use crate::{Error, Result};

/// The port that is tried first where none is asked for.
pub const DEFAULT_PORT: u16 = 8321;
/// Ports that are tried after it.
const TRIED: u16 = 20;
/// Connections at once.
const CONNECTIONS: usize = 32;
/// How long an event is waited for before the browser is to ask again.
const WAIT: Duration = Duration::from_secs(20);
/// How often the folder is looked at.
const LOOK: Duration = Duration::from_millis(400);

/// Serves the page of the run in `folder` on the loopback interface, on this port or, without one, on the first that is
/// free from [`DEFAULT_PORT`] on. Gives the address of the page.
///
/// # Errors
/// [`Error::Io`] when the port is taken.
pub fn serve(folder: &Path, port: Option<u16>) -> Result<(String, ListeningServer)> {
    let folder = folder.to_path_buf();
    let port = port.unwrap_or_else(free_port);
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let server = Server::new(move |request| answer(&folder, request))
        .with_max_concurrent_connections(CONNECTIONS)
        .bind(address);
    let place = format!("http://{address}/");
    let listening = server.spawn().map_err(Error::io("serve a page at", &place))?;
    Ok((place, listening))
}

fn free_port() -> u16 {
    let is_free = |port: &u16| TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).is_ok();
    (DEFAULT_PORT..DEFAULT_PORT + TRIED).find(is_free).unwrap_or(DEFAULT_PORT)
}

fn answer(folder: &Path, request: &Request<Body>) -> Response<Body> {
    if !is_local(request) {
        let words = "this page is for the machine it runs on";
        return respond(StatusCode::FORBIDDEN, "text/plain; charset=utf-8", words.into());
    }
    let html = "text/html; charset=utf-8";
    match request.uri().path() {
        "/" => {
            let state = state(folder);
            respond(StatusCode::OK, html, page(folder).live_html(state))
        }
        "/parts" => respond(StatusCode::OK, html, page(folder).parts()),
        "/events" => {
            let seen = request.headers().get("last-event-id");
            let seen = seen.and_then(|id| id.to_str().ok()).and_then(|id| id.parse().ok());
            respond(StatusCode::OK, "text/event-stream", event(folder, seen))
        }
        _ => respond(StatusCode::NOT_FOUND, "text/plain; charset=utf-8", "no such page".into()),
    }
}

/// Whether the page was asked for by a name of this machine: another site's name could lead here, too.
fn is_local(request: &Request<Body>) -> bool {
    let host = request.headers().get("host").and_then(|host| host.to_str().ok());
    host.is_some_and(|host| {
        let name = host.rsplit_once(':').map_or(host, |(name, _)| name);
        ["127.0.0.1", "localhost"].contains(&name)
    })
}

fn respond(status: StatusCode, kind: &str, text: String) -> Response<Body> {
    let response = Response::builder()
        .status(status)
        .header("content-type", kind)
        .header("cache-control", "no-store")
        .body(Body::from(text));
    response.expect("plain headers")
}

/// What is there to be seen: bytes of steps, and of the summary.
fn state(folder: &Path) -> u64 {
    let bytes = |name: &str| std::fs::metadata(folder.join(name)).map_or(0, |m| m.len());
    bytes("metrics.jsonl") + bytes("summary.json")
}

/// One event once the state is another than the one that was `seen`, or none after a while. The browser asks again.
fn event(folder: &Path, seen: Option<u64>) -> String {
    let start = Instant::now();
    loop {
        let now = state(folder);
        if seen != Some(now) {
            return format!("retry: 300\nid: {now}\ndata: {now}\n\n");
        }
        if start.elapsed() > WAIT {
            return "retry: 300\n: nothing new\n\n".into();
        }
        std::thread::sleep(LOOK);
    }
}

/// The page, or one that says why there is none yet.
fn page(folder: &Path) -> Page {
    of_run(folder).unwrap_or_else(|error| Page {
        title: "Waiting for the first step".into(),
        subtitle: error.to_string(),
        ..Page::default()
    })
}

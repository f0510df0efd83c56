//! Enter, pressed by whoever watches a run in a terminal.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Listens on stdin, without taking anything that another program in the foreground is to read.
pub struct Keys {
    pressed: Arc<AtomicBool>,
}

impl Keys {
    /// None where stdin is no terminal that can be waited for.
    #[cfg(unix)]
    pub fn listen() -> Option<Keys> {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        use std::io::IsTerminal;

        const WAIT: Timespec = Timespec { tv_sec: 0, tv_nsec: 300_000_000 };
        if !std::io::stdin().is_terminal() {
            return None;
        }
        let pressed = Arc::<AtomicBool>::default();
        let flag = pressed.clone();
        let listen = move || {
            let stdin = std::io::stdin();
            loop {
                // Reading in the background would stop the whole process.
                let ours = rustix::termios::tcgetpgrp(&stdin)
                    .is_ok_and(|group| group == rustix::process::getpgrp());
                let mut wanted = [PollFd::new(&stdin, PollFlags::IN)];
                let ready = poll(&mut wanted, Some(&WAIT)).is_ok_and(|n| n > 0);
                if !ours {
                    std::thread::sleep(std::time::Duration::from_millis(300));
                } else if ready {
                    match stdin.read_line(&mut String::new()) {
                        Ok(n) if n > 0 => flag.store(true, Ordering::Relaxed),
                        _ => return,
                    }
                }
            }
        };
        // It ends with the process.
        std::thread::Builder::new().name("keys".into()).spawn(listen).ok()?;
        Some(Keys { pressed })
    }

    /// None: nobody listens here.
    #[cfg(not(unix))]
    pub fn listen() -> Option<Keys> {
        None
    }

    /// Whether Enter was pressed since this was last asked.
    pub fn pressed(&self) -> bool {
        self.pressed.swap(false, Ordering::Relaxed)
    }
}

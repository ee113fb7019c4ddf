//! A small HTTP server on loopback that speaks the routes of the Hugging Face hub.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

pub(crate) const COMMIT: &str = "00112233445566778899aabbccddeeff00112233";

/// How the server treats one file.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Manner {
    /// As it should.
    Plain,
    /// Sends the reader to another address, as the hub does for large files.
    Redirect,
    /// Breaks off after half of what was asked for; the first so many times.
    BreakOff(usize),
    /// Sends other bytes than announced.
    Corrupt,
    /// Announces a content length, ignores ranges and sends the whole file each time.
    IgnoreRange,
    /// A redirect without a target.
    LostRedirect,
    /// An etag that would leave the cache.
    EvilEtag,
    /// A file of another commit than the list's.
    OtherCommit,
}

#[derive(Default)]
struct State {
    files: BTreeMap<String, (Vec<u8>, Manner)>,
    /// Token that is asked for.
    token: Option<String>,
    /// Answer of the route that lists files, when not the true list.
    list_status: Option<u16>,
    /// Every request: path, range and authorization headers.
    requests: Vec<Request>,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Request {
    pub(crate) path: String,
    pub(crate) range: Option<String>,
    pub(crate) authorization: Option<String>,
}

pub(crate) struct HubServer {
    pub(crate) endpoint: String,
    state: Arc<Mutex<State>>,
}

impl HubServer {
    /// Serves `org/model` with these files until the process ends.
    pub(crate) fn start(files: &[(&str, &[u8])]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let files = files
            .iter()
            .map(|(name, bytes)| ((*name).to_owned(), (bytes.to_vec(), Manner::Plain)))
            .collect();
        let state = Arc::new(Mutex::new(State {
            files,
            ..State::default()
        }));
        let shared = Arc::clone(&state);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = Arc::clone(&shared);
                std::thread::spawn(move || answer(stream, &state));
            }
        });
        Self { endpoint, state }
    }

    pub(crate) fn treat(&self, file: &str, manner: Manner) {
        self.state.lock().unwrap().files.get_mut(file).unwrap().1 = manner;
    }

    pub(crate) fn require_token(&self, token: &str) {
        self.state.lock().unwrap().token = Some(token.to_owned());
    }

    pub(crate) fn fail_list(&self, status: u16) {
        self.state.lock().unwrap().list_status = Some(status);
    }

    pub(crate) fn remove(&self, file: &str) {
        self.state.lock().unwrap().files.remove(file);
    }

    /// The requests since the last call.
    pub(crate) fn take_requests(&self) -> Vec<Request> {
        std::mem::take(&mut self.state.lock().unwrap().requests)
    }
}

fn answer(mut stream: TcpStream, state: &Mutex<State>) {
    let Some(request) = read_request(&stream) else { return };
    let mut state = state.lock().unwrap();
    state.requests.push(request.clone());
    if state.token.is_some() && request.authorization != state.token.as_ref().map(|t| format!("Bearer {t}")) {
        return send(&mut stream, 401, &[], b"", 0);
    }
    if request.path == "/api/models/org/model/revision/main" {
        let status = state.list_status.unwrap_or(200);
        let names: Vec<_> = state
            .files
            .keys()
            .map(|name| serde_json::json!({"rfilename": name}))
            .collect();
        let body = serde_json::json!({"sha": COMMIT, "siblings": names}).to_string();
        return send(&mut stream, status, &[], body.as_bytes(), body.len());
    }
    let resolved = request
        .path
        .strip_prefix(&format!("/org/model/resolve/{COMMIT}/"))
        .map(|name| (name.to_owned(), false));
    let Some((name, on_cdn)) = resolved.or_else(|| request.path.strip_prefix("/cdn/").map(|n| (n.to_owned(), true)))
    else {
        return send(&mut stream, 404, &[], b"", 0);
    };
    let Some((bytes, manner)) = state.files.get_mut(&name) else {
        return send(&mut stream, 404, &[], b"", 0);
    };
    send_file(&mut stream, &request, &name, bytes, manner, on_cdn);
}

fn send_file(stream: &mut TcpStream, request: &Request, name: &str, bytes: &[u8], manner: &mut Manner, on_cdn: bool) {
    let etag = match manner {
        Manner::EvilEtag => "\"../../../evil\"".to_owned(),
        _ => format!("\"{}\"", planish_core::hash::sha256_hex(bytes)),
    };
    let commit = match manner {
        Manner::OtherCommit => COMMIT.replace('0', "1"),
        _ => COMMIT.to_owned(),
    };
    let headers = [
        ("x-repo-commit", commit),
        ("etag", etag.clone()),
        ("x-linked-etag", etag),
    ];
    if *manner == Manner::LostRedirect {
        return send(stream, 302, &headers, b"", 0);
    }
    if *manner == Manner::Redirect && !on_cdn {
        // To the same machine under another name: an absolute address, so the reader must follow it as to a stranger.
        let host = format!("http://localhost:{}", stream.local_addr().unwrap().port());
        let [commit, etag, linked] = headers;
        return send(
            stream,
            302,
            &[commit, etag, linked, ("location", format!("{host}/cdn/{name}"))],
            b"",
            0,
        );
    }
    let start: usize = range_start(request)
        .filter(|_| *manner != Manner::IgnoreRange)
        .unwrap_or(0);
    let only_one = request.range.as_deref() == Some("bytes=0-0");
    if start >= bytes.len() {
        return send(stream, 416, &headers, b"", 0);
    }
    let end = if only_one { start + 1 } else { bytes.len() };
    let mut body = bytes[start..end].to_vec();
    let mut sent = body.len();
    match manner {
        Manner::BreakOff(times) if *times > 0 && !only_one => {
            *times -= 1;
            sent /= 2;
        }
        Manner::Corrupt if !only_one => body[0] ^= 1,
        _ => {}
    }
    let range = format!("bytes {start}-{}/{}", end - 1, bytes.len());
    let [commit, etag, linked] = headers;
    let all = [commit, etag, linked, ("content-range", range)];
    let status = if *manner == Manner::IgnoreRange && !only_one {
        200
    } else {
        206
    };
    send(stream, status, &all, &body[..sent], body.len());
}

fn range_start(request: &Request) -> Option<usize> {
    request
        .range
        .as_ref()?
        .strip_prefix("bytes=")?
        .split('-')
        .next()?
        .parse()
        .ok()
}

fn read_request(stream: &TcpStream) -> Option<Request> {
    let mut lines = BufReader::new(stream).lines();
    let path = lines.next()?.ok()?.split(' ').nth(1)?.to_owned();
    let mut request = Request {
        path,
        ..Request::default()
    };
    for line in lines.map_while(Result::ok).take_while(|line| !line.is_empty()) {
        let Some((name, value)) = line.split_once(':') else {
            continue;
        };
        match name.to_ascii_lowercase().as_str() {
            "range" => request.range = Some(value.trim().to_owned()),
            "authorization" => request.authorization = Some(value.trim().to_owned()),
            _ => {}
        }
    }
    Some(request)
}

/// Sends `body`, announcing `announced` bytes, and closes the connection.
fn send(stream: &mut TcpStream, status: u16, headers: &[(&str, String)], body: &[u8], announced: usize) {
    let mut head = format!("HTTP/1.1 {status} X\r\nContent-Length: {announced}\r\nConnection: close\r\n");
    for (name, value) in headers {
        head += &format!("{name}: {value}\r\n");
    }
    let _ = stream.write_all((head + "\r\n").as_bytes());
    let _ = stream.write_all(body);
}

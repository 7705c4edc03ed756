//! The command line.

use std::{
    ffi::OsString,
    fs::File,
    io::{self, BufWriter, Read, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Parser, Subcommand, error::ErrorKind};
use serde_json::{Value, json};

use crate::{
    Form, Payloads,
    error::Error,
    python_json::{self, Layout},
    x::{self, View},
};

/// The version of CRIU whose formats these are, and of this program.
const VERSION: &str = concat!("4.2 (rewake ", env!("CARGO_PKG_VERSION"), ")");

/// crit's exit status for a bad command line, as its Python original has it.
const USAGE: u8 = 2;

/// Shows checkpoint images as JSON, and makes images of JSON.
#[derive(Debug, Parser)]
#[command(name = "crit", bin_name = "crit", version = VERSION, infer_long_args = true, arg_required_else_help = false)]
struct Args {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Image to JSON
    #[command(infer_long_args = true)]
    Decode {
        /// Several lines, indented, with some numbers in the form that suits their field
        #[arg(long)]
        pretty: bool,
        /// The image (standard input if absent)
        #[arg(short, long = "in", value_name = "IN")]
        input: Option<PathBuf>,
        /// Where the JSON goes (standard output if absent)
        #[arg(short, long = "out", value_name = "OUT")]
        output: Option<PathBuf>,
    },
    /// JSON, pretty or not, to image
    #[command(infer_long_args = true)]
    Encode {
        /// The JSON (standard input if absent)
        #[arg(short, long = "in", value_name = "IN")]
        input: Option<PathBuf>,
        /// Where the image goes (standard output if absent)
        #[arg(short, long = "out", value_name = "OUT")]
        output: Option<PathBuf>,
    },
    /// What an image is, and how many entries it has
    Info {
        /// The image
        #[arg(value_name = "IN")]
        input: PathBuf,
    },
    /// Explore a directory of images
    X {
        /// The directory
        dir: PathBuf,
        /// What to show
        what: View,
    },
    /// Image to JSON on standard output, as with decode --pretty
    #[command(infer_long_args = true)]
    Show {
        /// The image
        #[arg(value_name = "IN")]
        input: PathBuf,
        /// Only the sizes of payloads
        #[arg(long)]
        nopl: bool,
    },
}

/// Runs crit with these arguments (without the program's name). What goes wrong is told on standard error.
///
/// The status is 0, 1 for what cannot be done or no command at all, or 2 for a command line that makes no sense.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args = std::iter::once(OsString::from("crit")).chain(args);
    let command = match Args::try_parse_from(args) {
        Ok(Args { command: Some(command) }) => command,
        Ok(Args { command: None }) => {
            eprintln!(
                "crit: a command is missing: decode, encode, info, x or show (see crit --help)"
            );
            return ExitCode::FAILURE;
        }
        Err(e) => {
            // To standard output if it was asked for; nothing is to be done if nobody listens.
            let _ = e.print();
            return match e.kind() {
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => ExitCode::SUCCESS,
                _ => ExitCode::from(USAGE),
            };
        }
    };
    match run(command) {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read has seen enough (`crit show … | head`).
        Err(Error::Output(e)) if e.kind() == io::ErrorKind::BrokenPipe => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("crit: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<(), Error> {
    match command {
        Command::Decode { pretty, input, output } => {
            let (name, bytes) = read_image(input.as_deref())?;
            let form = if pretty { Form::Pretty } else { Form::Plain };
            let value = decode(&name, &bytes, form, Payloads::Whole)?;
            let layout = if pretty { Layout::Indented } else { Layout::Line };
            write_json(output.as_deref(), &value, layout)
        }
        Command::Encode { input, output } => {
            let (_, bytes) = read(input.as_deref(), |_, _| Ok(()))?;
            let image = crate::encode(&serde_json::from_slice(&bytes)?)?;
            // Only now is the output opened: a document with a mistake in it leaves an older image as it is.
            write(output.as_deref(), |out| out.write_all(&image))
        }
        Command::Info { input } => {
            let (name, bytes) = read_image(Some(&input))?;
            let (magic, count) = crate::decode::info(&name, &bytes)?;
            write_json(None, &json!({"magic": magic, "count": count}), Layout::Indented)
        }
        Command::X { dir, what } => {
            let mut out = BufWriter::new(io::stdout().lock());
            x::explore(&dir, what, &mut out)?;
            Ok(out.flush()?)
        }
        Command::Show { input, nopl } => {
            let (name, bytes) = read_image(Some(&input))?;
            let payloads = if nopl { Payloads::Sizes } else { Payloads::Whole };
            let value = decode(&name, &bytes, Form::Pretty, payloads)?;
            write_json(None, &value, Layout::Indented)
        }
    }
}

fn decode(name: &Path, bytes: &[u8], form: Form, payloads: Payloads) -> Result<Value, Error> {
    let decoded = crate::decode::image(name, bytes, form, payloads)?;
    if decoded.incomplete > 0 {
        eprintln!(
            "crit: warning: {}: the JSON lacks something of {} entries, such as fields of a newer CRIU; encoding it again does not bring that back",
            name.display(),
            decoded.incomplete
        );
    }
    Ok(decoded.json)
}

/// Reads a whole image, but no further than its magic number if that says that it is none: pages files are large.
fn read_image(input: Option<&Path>) -> Result<(PathBuf, Vec<u8>), Error> {
    read(input, |name, start| crate::decode::detect(name, start).map(|_| ()))
}

/// Reads a file or standard input, and says what to call it. `check` sees the first eight bytes before the rest is read.
fn read(
    input: Option<&Path>,
    check: impl FnOnce(&Path, &[u8]) -> Result<(), Error>,
) -> Result<(PathBuf, Vec<u8>), Error> {
    let name = input.unwrap_or(Path::new("standard input")).to_owned();
    let failed = |source| Error::Read { path: name.clone(), source };
    let mut file: Box<dyn Read> = match input {
        Some(path) => Box::new(File::open(path).map_err(failed)?),
        None => Box::new(io::stdin().lock()),
    };
    let mut bytes = Vec::new();
    file.by_ref().take(8).read_to_end(&mut bytes).map_err(failed)?;
    check(&name, &bytes)?;
    file.read_to_end(&mut bytes).map_err(failed)?;
    Ok((name, bytes))
}

/// Writes JSON; standard output gets a newline after it.
fn write_json(output: Option<&Path>, value: &Value, layout: Layout) -> Result<(), Error> {
    write(output, |out| {
        python_json::write(out, value, layout)?;
        if output.is_none() { out.write_all(b"\n") } else { Ok(()) }
    })
}

fn write(
    output: Option<&Path>,
    body: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<(), Error> {
    let Some(path) = output else {
        let mut out = BufWriter::new(io::stdout().lock());
        body(&mut out)?;
        return Ok(out.flush()?);
    };
    let failed = |source| Error::Write { path: path.to_owned(), source };
    let mut out = BufWriter::new(File::create(path).map_err(failed)?);
    body(&mut out).and_then(|()| out.flush()).map_err(failed)
}

//! The command line: what goes where, and the exit status. This program runs itself as crit.

mod common;

use std::{
    env, fs,
    io::Write,
    path::PathBuf,
    process::{Command, ExitCode, Stdio},
};

use libtest_mimic::{Arguments, Failed, Trial};

/// Set for the child that is to be crit.
const AS_CRIT: &str = "REWAKE_TEST_AS_CRIT";

const FDINFO: &[u8] = b"\x19\x43\x56\x54\x32\x37\x21\x56\x08\0\0\0\x08\x01\x10\0\x18\x01\x20\x03";
const LINE: &str =
    r#"{"magic": "FDINFO", "entries": [{"id": 1, "flags": 0, "type": "REG", "fd": 3}]}"#;

fn main() -> ExitCode {
    if env::var_os(AS_CRIT).is_some() {
        return rewake_crit::main(env::args_os().skip(1));
    }
    let tests: &[(&str, fn())] = &[
        ("decode_and_encode_by_pipe", decode_and_encode_by_pipe),
        ("decode_and_encode_by_file", decode_and_encode_by_file),
        ("show_and_info", show_and_info),
        ("options_have_all_their_spellings", options_have_all_their_spellings),
        ("help_and_version", help_and_version),
        ("wrong_command_lines", wrong_command_lines),
        ("failures", failures),
        ("a_failure_leaves_the_output_alone", a_failure_leaves_the_output_alone),
        ("unknown_fields_are_told", unknown_fields_are_told),
        ("a_reader_that_goes_is_no_crash", a_reader_that_goes_is_no_crash),
    ];
    let run =
        |test: fn()| move || std::panic::catch_unwind(test).map_err(|_| Failed::without_message());
    let trials = tests.iter().map(|&(name, test)| Trial::test(name, run(test))).collect();
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

/// Exit status, standard output, standard error.
fn crit(args: &[&str], input: &[u8]) -> (i32, String, String) {
    let mut child = start(args);
    // It may end without having read all.
    let _ = child.stdin.take().unwrap().write_all(input);
    let output = child.wait_with_output().unwrap();
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().expect("ended by a signal"), text(&output.stdout), text(&output.stderr))
}

fn start(args: &[&str]) -> std::process::Child {
    let mut command = Command::new(env::current_exe().unwrap());
    command
        .args(args)
        .env(AS_CRIT, "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command.spawn().unwrap()
}

fn file(name: &str, content: &[u8]) -> String {
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR"))
        .join(format!("crit-{}-{name}", std::process::id()));
    fs::write(&path, content).unwrap();
    path.into_os_string().into_string().unwrap()
}

fn decode_and_encode_by_pipe() {
    assert_eq!(crit(&["decode"], FDINFO), (0, format!("{LINE}\n"), String::new()));
    let mut child = start(&["encode"]);
    child.stdin.take().unwrap().write_all(LINE.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success() && output.stdout == FDINFO, "{output:?}");
}

fn decode_and_encode_by_file() {
    let (image, json, again) =
        (file("a.img", FDINFO), file("a.json", b"to be replaced"), file("b.img", b""));
    assert_eq!(
        crit(&["decode", "-i", &image, "-o", &json], b""),
        (0, String::new(), String::new())
    );
    assert_eq!(fs::read_to_string(&json).unwrap(), LINE, "no newline at the end of a file");
    assert_eq!(crit(&["decode", "--pretty", "-i", &image, "-o", &json], b"").0, 0);
    assert!(
        fs::read_to_string(&json)
            .unwrap()
            .starts_with("{\n    \"magic\": \"FDINFO\",\n    \"entries\": [\n        {\n")
    );
    assert_eq!(
        crit(&["encode", "-i", &json, "-o", &again], b""),
        (0, String::new(), String::new())
    );
    assert_eq!(fs::read(&again).unwrap(), FDINFO);
}

fn show_and_info() {
    let kind = rewake_image::kind::by_name("PIPES_DATA").unwrap();
    let mut image = common::header(kind);
    image.extend(b"\x04\0\0\0\x08\x01\x10\x03abc");
    let image = file("c.img", &image);
    let (_, pretty, _) = crit(&["decode", "--pretty", "-i", &image], b"");
    assert_eq!(crit(&["show", &image], b""), (0, pretty.clone(), String::new()));
    assert_eq!(crit(&["show", "--nopl", &image], b"").1, pretty.replace("YWJj\\n", "... <3B>"));
    let want = "{\n    \"magic\": \"PIPES_DATA\",\n    \"count\": 1\n}\n";
    assert_eq!(crit(&["info", &image], b""), (0, want.to_owned(), String::new()));

    let kind = rewake_image::kind::by_name("PAGEMAP").unwrap();
    let mut image = common::header(kind);
    image.extend(b"\x02\0\0\0\x08\x01\x04\0\0\0\x08\0\x10\0");
    assert!(
        crit(&["info", &file("d.img", &image)], b"").1.contains("\"count\": 1"),
        "the head does not count"
    );
}

fn options_have_all_their_spellings() {
    let image = file("e.img", FDINFO);
    let want = crit(&["decode", "--pretty", "-i", &image], b"");
    for args in [
        &["decode", "-i", &image, "--pretty"][..],
        &["decode", "--pre", "--in", &image],
        &["decode", "--pretty", &format!("--in={image}")],
        &["decode", &format!("-i{image}"), "--pretty"],
        &["show", &image],
    ] {
        assert_eq!(crit(args, b""), want, "{args:?}");
    }
}

fn help_and_version() {
    let (status, text, _) = crit(&["--version"], b"");
    assert!(status == 0 && text.contains("4.2 "), "{text}");
    for command in [&[][..], &["decode"], &["encode"], &["info"], &["x"], &["show"]] {
        let (status, text, _) = crit(&[command, &["--help"]].concat(), b"");
        assert!(status == 0 && text.contains("Usage: crit"), "{text}");
    }
}

fn wrong_command_lines() {
    for args in [
        &["frob"][..],
        &["show"],
        &["info"],
        &["x"],
        &["x", "."],
        &["x", ".", "foo"],
        &["decode", "--frob"],
        &["decode", "file"],
    ] {
        let (status, out, err) = crit(args, b"");
        assert!(status == 2 && out.is_empty() && !err.is_empty(), "{args:?}: {status} {out} {err}");
    }
    let (status, _, err) = crit(&[], b"");
    assert!(status == 1 && err.contains("a command is missing"), "{err}");
}

fn failures() {
    let told = |args: &[&str], input: &[u8]| {
        let (status, out, err) = crit(args, input);
        assert!(
            status == 1 && out.is_empty() && err.starts_with("crit: "),
            "{args:?}: {status} {out} {err}"
        );
        err
    };
    let unknown = told(&["decode"], b"\x16\x32\x37\x21abcd");
    assert!(unknown.contains("Unknown magic 0x21373216: standard input is no image"), "{unknown}");
    assert!(told(&["info", &file("f.img", &[0; 100])], b"").contains("Unknown magic 0x0: /"));
    assert!(told(&["decode"], b"").contains("standard input ends before its magic number does"));
    let cut = told(&["decode"], &FDINFO[..18]);
    assert!(
        cut.contains(
            "standard input: entry 0, byte 12: the message: a length of 8 bytes where 6 are left"
        ),
        "{cut}"
    );
    assert!(
        told(&["decode"], b"\x19\x43\x56\x54\x32\x37\x21\x56\x02\0\0\0\x08\x01")
            .contains("the required field is missing")
    );
    let syntax = told(&["encode"], b"{\n  \"magic\" }");
    assert!(
        syntax.contains("the text is not JSON: ") && syntax.contains("line 2 column 11"),
        "{syntax}"
    );
    assert!(
        told(&["encode"], b"{\"magic\": \"FS\", \"entries\": [{}]}")
            .contains("entries[0]: fs_entry needs a field `cwd_id`")
    );
    assert!(
        told(&["show", "/nonexistent/x.img"], b"")
            .contains("cannot read /nonexistent/x.img: No such file")
    );
    assert!(told(&["show", "/"], b"").contains("cannot read /: "));
    assert!(
        told(&["x", "/nonexistent", "ps"], b"")
            .contains("cannot read /nonexistent/pstree.img: No such file")
    );
    let image = file("g.img", FDINFO);
    assert!(
        told(&["decode", "-i", &image, "-o", "/nonexistent/x"], b"")
            .contains("cannot write /nonexistent/x: No such file")
    );
}

fn a_failure_leaves_the_output_alone() {
    let output = file("h.img", b"precious");
    assert_eq!(crit(&["encode", "-o", &output], b"{}").0, 1);
    assert_eq!(crit(&["decode", "-o", &output], b"garbage!").0, 1);
    assert_eq!(fs::read(&output).unwrap(), b"precious");
}

fn unknown_fields_are_told() {
    let mut image = FDINFO.to_vec();
    image[8] += 3;
    image.extend(b"\xa0\x06\x05");
    let (status, out, err) = crit(&["decode"], &image);
    assert_eq!((status, out), (0, format!("{LINE}\n")));
    assert!(
        err.contains("warning: standard input: the JSON lacks something of 1 entries"),
        "{err}"
    );
}

fn a_reader_that_goes_is_no_crash() {
    let entry = &FDINFO[8..];
    let image = file("i.img", &[&FDINFO[..8], &entry.repeat(100_000)].concat());
    let mut child = start(&["show", &image]);
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(
        (output.status.code(), String::from_utf8_lossy(&output.stderr).as_ref()),
        (Some(1), "")
    );
}

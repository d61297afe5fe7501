//! `vpci-vmm ctl` against a VM that runs, on the KVM of this machine.

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Output};

use common::*;
use serde_json::{Value, json};

const BUS: &str = "11223344-1234-4000-8000-000000000001";
const OTHER: &str = "11223344-0777-4000-8000-000000000002";

/// A VM whose guest prints a dot and goes on for ever.
struct Vm {
    run: Run,
    child: Child,
    socket: PathBuf,
}

impl Vm {
    fn start(test: &str) -> Option<Self> {
        let code = [out(0x3f8, b'.'), SPIN.to_vec()].concat();
        let run = Run::new(test, &code)?;
        let socket = run.dir.path().join("socket");
        let run = run.with(&[
            "--cpus",
            "2",
            "--vpci",
            &format!("rng,bus={BUS}"),
            "--api-socket",
            socket.to_str().unwrap(),
        ]);
        let mut child = run.start();
        let mut byte = [0];
        let output = child.stdout.as_mut().unwrap();
        output.read_exact(&mut byte).unwrap();
        Some(Self { run, child, socket })
    }

    fn ctl(&self, args: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_vpci-vmm"))
            .args(["ctl", "--socket", self.socket.to_str().unwrap()])
            .args(args)
            .output()
            .unwrap()
    }

    /// Output of a verb that must succeed.
    fn text(&self, args: &[&str]) -> String {
        let output = self.ctl(args);
        assert_eq!(output.status.code(), Some(0), "{}", errors(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    /// The refusal of a verb that must fail.
    fn refusal(&self, args: &[&str]) -> String {
        let output = self.ctl(args);
        assert_eq!(output.status.code(), Some(1), "{}", errors(&output));
        let text = errors(&output);
        assert_eq!(text.lines().count(), 1, "{text}");
        text
    }

    fn list(&self) -> Value {
        let text = self.text(&["--json", "list"]);
        serde_json::from_str::<Value>(&text).unwrap()["result"].clone()
    }

    /// Sends a line and gives the reply.
    fn raw(&self, line: &str) -> Value {
        let mut stream = UnixStream::connect(&self.socket).unwrap();
        stream.write_all(line.as_bytes()).unwrap();
        stream.write_all(b"\n").unwrap();
        let mut reply = String::new();
        BufReader::new(stream).read_line(&mut reply).unwrap();
        serde_json::from_str(&reply).unwrap()
    }

    fn quit(self) {
        self.text(&["quit"]);
        let (output, report) = self.run.finish(self.child);
        assert_eq!(output.status.code(), Some(0), "{}", errors(&output));
        assert_eq!(report["end"], "quit");
        assert!(!self.socket.exists());
    }
}

#[test]
fn buses_come_and_go_while_the_guest_runs() {
    let Some(vm) = Vm::start("buses_come_and_go_while_the_guest_runs") else {
        return;
    };
    let mode = vm.socket.metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let list = vm.list();
    assert_eq!(list["state"], "running");
    assert_eq!(list["buses"][0]["bus"], BUS);
    assert_eq!(list["buses"][0]["domain_hint"], 0x1234);
    assert_eq!(list["buses"][0]["open"], false);
    assert_eq!(list["buses"][0]["functions"][0]["kind"], "rng");
    assert_eq!(list["buses"][0]["functions"][0]["logical_id"], 0x1234_4000);

    let disk = vm.run.dir.path().join("disk");
    std::fs::write(&disk, vec![0; 1 << 16]).unwrap();
    let blk = format!("blk,path={},bus={OTHER}", disk.display());
    let testdev = format!("testdev,fn=1,bus={OTHER}");
    let text = vm.text(&["plug", &blk, &testdev]);
    assert_eq!(text, format!("plugged in bus {OTHER}\n"));
    let list = vm.list();
    let functions = list["buses"][1]["functions"].as_array().unwrap();
    let kinds: Vec<_> = functions.iter().map(|f| &f["kind"]).collect();
    assert_eq!(kinds, ["blk", "testdev"]);
    assert!(vm.text(&["list"]).contains("(PCI domain 0777): not open"));

    // The guest has no bus open, so it has nothing to let go of.
    let text = vm.text(&["eject", OTHER]);
    assert!(text.contains("let go"), "{text}");
    assert!(vm.refusal(&["eject", OTHER]).contains("no such bus"));
    // Its name is free at once where the guest never saw the offer, and a bus without a name gets one.
    vm.text(&["plug", &blk]);
    vm.text(&["plug", "rng"]);
    assert_eq!(vm.list()["buses"].as_array().unwrap().len(), 3);
    vm.text(&["remove", "--surprise", OTHER]);
    vm.text(&["eject", "--no-wait", BUS]);
    vm.quit();
}

#[test]
fn clients_that_plug_in_at_once_get_a_bus_each() {
    const CLIENTS: usize = 12;
    let Some(vm) = Vm::start("clients_that_plug_in_at_once_get_a_bus_each") else {
        return;
    };
    let start = std::sync::Barrier::new(CLIENTS);
    let request = json!({"command": "plug", "specs": ["rng"]}).to_string();
    std::thread::scope(|scope| {
        for _ in 0..CLIENTS {
            scope.spawn(|| {
                start.wait();
                let reply = vm.raw(&request);
                assert!(reply["result"]["plugged"].is_string(), "{reply}");
            });
        }
    });
    let list = vm.list();
    let buses = list["buses"].as_array().unwrap();
    let domains: std::collections::BTreeSet<_> = buses
        .iter()
        .map(|bus| bus["domain_hint"].as_u64())
        .collect();
    assert_eq!((buses.len(), domains.len()), (CLIENTS + 1, CLIENTS + 1));
    vm.quit();
}

#[test]
fn one_function_of_a_bus_leaves_and_the_others_stay() {
    let Some(vm) = Vm::start("one_function_of_a_bus_leaves_and_the_others_stay") else {
        return;
    };
    let disk = vm.run.dir.path().join("disk");
    std::fs::write(&disk, vec![0; 1 << 16]).unwrap();
    let blk = format!("blk,path={},fn=2,bus={OTHER}", disk.display());
    let others = [0, 1, 3].map(|number| format!("testdev,fn={number},bus={OTHER}"));
    let [zero, one, three] = &others;
    vm.text(&["plug", zero, one, &blk, three]);
    let functions = || -> Vec<u64> {
        let list = vm.list();
        let functions = list["buses"][1]["functions"].as_array().unwrap();
        functions
            .iter()
            .map(|f| f["function"].as_u64().unwrap())
            .collect()
    };
    assert_eq!(functions(), [0, 1, 2, 3]);
    let text = vm.text(&["eject", OTHER, "--fn", "2"]);
    let expected = format!("the guest let go of function 2 of bus {OTHER}; it is gone\n");
    assert_eq!(text, expected);
    assert_eq!(functions(), [0, 1, 3]);
    // Its image is free for another disk.
    vm.text(&["plug", &format!("blk,path={}", disk.display())]);
    let text = vm.refusal(&["eject", OTHER, "--fn", "2"]);
    assert!(text.contains("no function 2"), "{text}");
    let text = vm.text(&["remove", "--surprise", OTHER, "--fn", "3"]);
    assert_eq!(text, format!("function 3 of bus {OTHER} is gone\n"));
    assert_eq!(functions(), [0, 1]);
    let answer = vm.raw(&format!(
        r#"{{"command":"eject","bus":"{OTHER}","function":1}}"#
    ));
    let expected = json!({"ejected": OTHER, "function": 1, "how": "released"});
    assert_eq!(answer["result"], expected);
    for (function, kind) in [
        (0, "bad-request"),
        (1, "no-such-function"),
        (9, "no-such-function"),
    ] {
        for command in ["eject", "remove"] {
            let line =
                format!(r#"{{"command":"{command}","bus":"{OTHER}","function":{function}}}"#);
            assert_eq!(vm.raw(&line)["error"]["kind"], kind, "{line}");
        }
    }
    assert_eq!(functions(), [0]);
    vm.quit();
}

#[test]
fn what_cannot_be_plugged_in_is_refused_with_the_reason() {
    let Some(vm) = Vm::start("what_cannot_be_plugged_in_is_refused_with_the_reason") else {
        return;
    };
    for (specs, reason) in [
        (vec!["fly"], "unknown kind 'fly'"),
        (vec!["rng,x=1"], "unknown key 'x'"),
        (vec!["blk,path=/nonexistent/image"], "/nonexistent/image"),
        (vec!["rng", "rng"], "one bus at a time"),
        (vec!["rng,iommu=on"], "the VM has none"),
    ] {
        let args = [vec!["plug"], specs].concat();
        let text = vm.refusal(&args);
        assert!(text.contains(reason), "{text}");
    }
    let same = format!("rng,bus={BUS}");
    let text = vm.refusal(&["plug", &same]);
    assert!(text.contains("0x1234"), "{text}");
    let lonely = format!("rng,fn=3,bus={OTHER}");
    let text = vm.refusal(&["plug", &lonely]);
    assert!(text.contains("no function 0"), "{text}");
    assert_eq!(vm.list()["buses"].as_array().unwrap().len(), 1);
    vm.quit();
}

#[test]
fn a_machine_pauses_and_goes_on() {
    let Some(vm) = Vm::start("a_machine_pauses_and_goes_on") else {
        return;
    };
    assert_eq!(vm.text(&["pause"]), "the machine is paused\n");
    assert_eq!(vm.list()["state"], "paused");
    assert_eq!(vm.text(&["pause"]), "the machine is paused\n");
    assert_eq!(vm.text(&["resume"]), "the machine is running\n");
    vm.text(&["pause"]);
    // It ends from here as well.
    vm.quit();
}

#[test]
fn a_malformed_request_gets_an_error_and_harms_nobody() {
    let Some(vm) = Vm::start("a_malformed_request_gets_an_error_and_harms_nobody") else {
        return;
    };
    let long = "x".repeat(1 << 20);
    let lines = [
        "",
        "{",
        "[]",
        r#"{"command":"fly"}"#,
        r#"{"command":"eject"}"#,
        r#"{"command":"eject","bus":"x"}"#,
        r#"{"command":"eject","bus":"11223344-1234-4000-8000-000000000001","timeout_s":3601}"#,
        r#"{"command":"remove","bus":1}"#,
        long.as_str(),
    ];
    for line in lines {
        let reply = vm.raw(line);
        assert_eq!(reply["error"]["kind"], "bad-request", "{reply}");
    }
    let reply = vm.raw(&json!({"command": "remove", "bus": OTHER}).to_string());
    assert_eq!(reply["error"]["kind"], "no-such-bus");
    vm.quit();
}

#[test]
fn more_than_16_clients_are_told_to_come_again() {
    let Some(vm) = Vm::start("more_than_16_clients_are_told_to_come_again") else {
        return;
    };
    let connect = || BufReader::new(UnixStream::connect(&vm.socket).unwrap());
    let ask = |client: &mut BufReader<UnixStream>| {
        client
            .get_mut()
            .write_all(b"{\"command\":\"list\"}\n")
            .unwrap();
        let mut reply = String::new();
        client.read_line(&mut reply).unwrap();
        serde_json::from_str::<Value>(&reply).unwrap()
    };
    let mut clients: Vec<_> = (0..16).map(|_| connect()).collect();
    for client in &mut clients {
        assert_eq!(ask(client)["result"]["state"], "running");
    }
    let mut refused = String::new();
    connect().read_line(&mut refused).unwrap();
    let refused: Value = serde_json::from_str(&refused).unwrap();
    assert_eq!(refused["error"]["kind"], "busy");
    // Those who were there go on.
    assert_eq!(ask(&mut clients[15])["result"]["state"], "running");
    drop(clients);
    // The VMM sees them go one by one.
    let start = std::time::Instant::now();
    while vm.ctl(&["list"]).status.code() != Some(0) {
        assert!(start.elapsed().as_secs() < 10);
    }
    vm.quit();
}

#[test]
fn nobody_at_the_socket_is_said_and_exits_with_3() {
    let output = Command::new(env!("CARGO_BIN_EXE_vpci-vmm"))
        .args(["ctl", "--socket", "/nonexistent/socket", "list"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(3));
    let text = errors(&output);
    assert!(text.contains("/nonexistent/socket"), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
}

#[test]
fn a_socket_in_use_stops_a_second_vm() {
    let Some(vm) = Vm::start("a_socket_in_use_stops_a_second_vm") else {
        return;
    };
    let Some(second) = Run::new("a_socket_in_use_stops_a_second_vm", &SPIN) else {
        return;
    };
    let second = second.with(&["--api-socket", vm.socket.to_str().unwrap()]);
    let output = second.start().wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    let text = errors(&output);
    assert!(text.contains("another program listens"), "{text}");
    vm.quit();
}

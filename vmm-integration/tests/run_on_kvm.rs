//! `vpci-vmm run` with guests of a few instructions, on the KVM of this machine.

mod common;

use std::fs;
use std::io::{Read, Write};
use std::process::{Command, Stdio};

use common::*;

#[test]
fn a_guest_prints_on_the_serial_port_and_powers_off() {
    let code = [out(0x3f8, b'h'), out(0x3f8, b'i'), POWER_OFF.to_vec()].concat();
    let Some(run) = Run::new("a_guest_prints_on_the_serial_port_and_powers_off", &code) else {
        return;
    };
    let (output, report) = run.to_end();
    assert_eq!(output.status.code(), Some(0), "{}", errors(&output));
    assert_eq!(output.stdout, b"hi");
    assert_eq!(report["end"], "poweroff");
    assert_eq!(report["resets"], 0);
}

#[test]
fn input_reaches_the_guest_however_much_of_it_there_is() {
    // More than the receive FIFO of 64 bytes holds, then the end of the input.
    const COUNT: usize = 300;
    let code = [echo().repeat(COUNT), POWER_OFF.to_vec()].concat();
    let Some(run) = Run::new("input_reaches_the_guest_however_much_of_it_there_is", &code) else {
        return;
    };
    let mut child = run.start_with(Stdio::piped());
    let text: Vec<u8> = (0..COUNT).map(|i| b'a' + (i % 26) as u8).collect();
    child.stdin.take().unwrap().write_all(&text).unwrap();
    let (output, _) = run.finish(child);
    assert_eq!(output.status.code(), Some(0), "{}", errors(&output));
    assert_eq!(output.stdout, text);
}

#[test]
fn a_hypercall_through_the_page_comes_back_with_its_status() {
    let mut code = stack();
    // GUEST_OS_ID = 1, then HYPERCALL = page 0x200000, enabled.
    for (msr, value) in [(0x4000_0000u32, 1u32), (0x4000_0001, 0x20_0001)] {
        code.push(0xb9); // mov ecx
        code.extend(msr.to_le_bytes());
        code.push(0xb8); // mov eax
        code.extend(value.to_le_bytes());
        code.extend([0x31, 0xd2, 0x0f, 0x30]); // xor edx, edx; wrmsr
    }
    // A fast call with a code that nobody offers: status 2.
    code.extend([0xb9, 0x7f, 0x00, 0x01, 0x00]); // mov ecx, 0x1007f
    code.extend([0xb8, 0x00, 0x00, 0x20, 0x00, 0xff, 0xd0]); // mov eax, 0x200000; call rax
    code.extend([0x04, 0x30, 0x66, 0xba, 0xf8, 0x03, 0xee]); // add al, '0'; out 0x3f8, al
    code.extend(POWER_OFF);
    let Some(run) = Run::new(
        "a_hypercall_through_the_page_comes_back_with_its_status",
        &code,
    ) else {
        return;
    };
    let (output, report) = run.to_end();
    assert_eq!(output.status.code(), Some(0), "{}", errors(&output));
    assert_eq!(output.stdout, b"2");
    assert_eq!(report["counters"]["hypercall.unknown_codes"], 1);
}

#[test]
fn marks_keep_the_counts_of_every_function() {
    let code = [out(0xf4, 7), out(0xf4, 9), POWER_OFF.to_vec()].concat();
    let Some(run) = Run::new("marks_keep_the_counts_of_every_function", &code) else {
        return;
    };
    let disk = run.dir.path().join("disk");
    fs::write(&disk, vec![0; 1 << 16]).unwrap();
    let bus = "bus=11223344-1234-4000-8000-000000000001";
    let blk = format!("blk,path={},queues=2,{bus}", disk.display());
    let run = run.with(&[
        "--vpci",
        &blk,
        "--vpci",
        &format!("rng,{bus},fn=1"),
        "--vpci",
        "testdev",
    ]);
    let (output, report) = run.to_end();
    assert_eq!(output.status.code(), Some(0), "{}", errors(&output));
    let ids: Vec<u64> = report["marks"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| m["id"].as_u64().unwrap())
        .collect();
    assert_eq!(ids, [7, 9]);
    let functions = report["marks"][0]["functions"].as_array().unwrap();
    let kinds: Vec<&str> = functions
        .iter()
        .map(|f| f["kind"].as_str().unwrap())
        .collect();
    assert_eq!(kinds, ["blk", "rng", "testdev"]);
    assert_eq!(functions[0]["logical_id"], 0x1234_4000);
    assert_eq!(functions[1]["logical_id"], 0x1234_4001);
    assert_eq!(functions[0]["domain_hint"], 0x1234);
    assert_eq!(functions[0]["vectors"].as_array().unwrap().len(), 3);
}

#[test]
fn a_guest_that_only_resets_is_stopped() {
    let fault = [stack(), TRIPLE_FAULT.to_vec()].concat();
    for code in [RESET.to_vec(), RESET_VECTOR.to_vec(), fault] {
        let Some(run) = Run::new("a_guest_that_only_resets_is_stopped", &code) else {
            return;
        };
        let (output, report) = run.with(&["--cpus", "2"]).to_end();
        assert_eq!(output.status.code(), Some(1));
        assert!(
            errors(&output).contains("does not get anywhere"),
            "{}",
            errors(&output)
        );
        assert_eq!(report["end"], "reset-limit");
    }
}

#[test]
fn a_reset_starts_the_same_kernel_again() {
    // The first time the byte at 0x90000 is clear: print, set it, reset. RAM keeps it. The second
    // time: print something else, power off.
    let second = [out(0x3f8, b'2'), POWER_OFF.to_vec()].concat();
    let mut code = vec![0x80, 0x3c, 0x25, 0x00, 0x00, 0x09, 0x00, 0x00]; // cmp byte [0x90000], 0
    code.extend([0x74, second.len() as u8]); // je first
    code.extend(&second);
    code.extend([0xc6, 0x04, 0x25, 0x00, 0x00, 0x09, 0x00, 0x01]); // mov byte [0x90000], 1
    code.extend(out(0x3f8, b'1'));
    code.extend(RESET);
    let Some(run) = Run::new("a_reset_starts_the_same_kernel_again", &code) else {
        return;
    };
    let (output, report) = run.with(&["--cpus", "3"]).to_end();
    assert_eq!(output.status.code(), Some(0), "{}", errors(&output));
    assert_eq!(output.stdout, b"12");
    assert_eq!(report["resets"], 1);
}

#[test]
fn signals_end_a_guest_that_never_stops() {
    for signal in ["INT", "TERM"] {
        let code = [out(0x3f8, b'.'), SPIN.to_vec()].concat();
        let Some(run) = Run::new("signals_end_a_guest_that_never_stops", &code) else {
            return;
        };
        let mut child = run.start();
        // Its first output: the guest runs.
        let mut byte = [0];
        child
            .stdout
            .as_mut()
            .unwrap()
            .read_exact(&mut byte)
            .unwrap();
        let kill = Command::new("kill")
            .args(["-s", signal, &child.id().to_string()])
            .status();
        assert!(kill.unwrap().success());
        let (output, report) = run.finish(child);
        assert_eq!(output.status.code(), Some(1));
        assert_eq!(
            errors(&output).trim_end(),
            format!("vpci-vmm: ended by SIG{signal}")
        );
        assert_eq!(report["end"], "interrupted");
    }
}

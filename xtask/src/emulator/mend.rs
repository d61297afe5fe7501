//! Defects of QEMU's SVM emulation, taken out of the unpacked program.
//!
//! Each is found by what its code does and not by an address. A version in which one is not found
//! stays as it is in that respect.
#![forbid(unsafe_code)]

mod ignne;
mod vector;

use anyhow::Context;
use anyhow::Result;
use iced_x86::Decoder;
use iced_x86::DecoderOptions;
use iced_x86::Instruction;
use object::Object;
use object::ObjectSection;
use object::ObjectSymbol;
use object::read::elf::ElfFile64;

/// Bytes to put at an address.
#[derive(Debug, PartialEq, Eq)]
struct Patch {
    address: u64,
    bytes: Vec<u8>,
}

/// A function of the program.
#[derive(Clone, Copy, Debug)]
struct Function<'a> {
    address: u64,
    code: &'a [u8],
}

/// Finds what to overwrite.
type Find = fn(&Functions<'_>) -> Result<Patch>;

/// The functions of the program that have names.
struct Functions<'a>(ElfFile64<'a, object::Endianness>);

impl<'a> Functions<'a> {
    fn get(&self, name: &str) -> Result<Function<'a>> {
        let mut symbols = self.0.dynamic_symbols();
        let symbol = symbols.find(|symbol| symbol.name() == Ok(name));
        let symbol = symbol.with_context(|| format!("no symbol {name}"))?;
        let section = self
            .0
            .section_by_index(symbol.section_index().context(name.to_owned())?)?;
        let code = section
            .data_range(symbol.address(), symbol.size())?
            .with_context(|| format!("{name} is not in the file"))?;
        Ok(Function {
            address: symbol.address(),
            code,
        })
    }

    /// Where in the file the byte at an address is.
    fn offset(&self, address: u64) -> Result<usize> {
        let mut sections = self.0.sections();
        let section = sections.find(|section| {
            let start = section.address();
            (start..start + section.size()).contains(&address)
        });
        let section = section.with_context(|| format!("nothing is at {address:#x}"))?;
        let (in_file, _) = section.file_range().context("no code in the file")?;
        Ok(usize::try_from(address - section.address() + in_file)?)
    }
}

fn decode(code: &[u8], start: u64) -> Vec<Instruction> {
    let decoder = Decoder::with_ip(64, code, start, DecoderOptions::NONE);
    decoder.into_iter().collect()
}

/// Takes the defects that are found out of a program file.
///
/// # Errors
///
/// Some were not found as expected; what names them says which.
pub(super) fn mend(program: &mut [u8]) -> Result<()> {
    let finders: [(&str, Find); 2] = [("vector", vector::find), ("ignne", ignne::find)];
    let mut missing = Vec::new();
    for (name, find) in finders {
        let found = locate(program, find);
        let mended = found.and_then(|(offset, bytes)| {
            let place = program.get_mut(offset..offset + bytes.len());
            let place = place.context("it is beyond the file's end")?;
            place.copy_from_slice(&bytes);
            Ok(())
        });
        if let Err(error) = mended {
            missing.push(format!("{name}: {error:#}"));
        }
    }
    match missing.is_empty() {
        true => Ok(()),
        false => Err(anyhow::anyhow!(missing.join("; "))),
    }
}

/// Offset in the file, and what to put there.
fn locate(program: &[u8], find: Find) -> Result<(usize, Vec<u8>)> {
    let functions = Functions(ElfFile64::parse(program)?);
    let patch = find(&functions)?;
    Ok((functions.offset(patch.address)?, patch.bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_program_is_refused_and_unchanged() {
        let mut program = b"#!/bin/sh".to_vec();
        mend(&mut program).unwrap_err();
        assert_eq!(program, b"#!/bin/sh");
    }
}

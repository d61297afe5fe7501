//! Kernel modules: which files a set of modules needs, and in which order they load.
//!
//! Debian's split kernel packages ship no `modules.dep`, so dependencies are read from the modules
//! themselves: the `.modinfo` ELF section holds zero-terminated `key=value` strings, among them
//! `name` and the comma-separated `depends` (kernel files `include/linux/module.h`,
//! `scripts/mod/modpost.c`).
#![forbid(unsafe_code)]

use object::Object;
use object::ObjectSection;
use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::path::PathBuf;
use thiserror::Error;

/// Folder of an initramfs that holds the packed modules.
pub const MODULE_DIR: &str = "/lib/modules";

/// File of an initramfs that lists the packed modules: one absolute path a line, in an order in
/// which every module comes after those it depends on.
pub const MODULE_LIST: &str = "/lib/modules.list";

/// Errors of finding and ordering modules.
#[derive(Debug, Error)]
pub enum ModuleError {
    /// Neither a file nor built into the kernel.
    #[error("kernel module {name} does not exist{}", for_whom(.needed_by))]
    Missing {
        /// Name of the module.
        name: String,
        /// The module that depends on it, if it was not asked for itself.
        needed_by: Option<String>,
    },
    /// Modules depend on each other in a circle.
    #[error("kernel module {name} depends on itself")]
    Cycle {
        /// A module on the circle.
        name: String,
    },
    /// The file is no kernel module.
    #[error("{}: not a kernel module: {reason}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The file cannot be read.
    #[error("{}: cannot read", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
}

fn for_whom(module: &Option<String>) -> String {
    match module {
        Some(module) => format!(" (needed by {module})"),
        None => String::new(),
    }
}

/// What a module says about itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModInfo {
    /// Name, with `_` for `-`.
    pub name: String,
    /// Names of the modules that must be loaded before, with `_` for `-`.
    pub depends: Vec<String>,
}

/// A module to load.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// Name, with `_` for `-`.
    pub name: String,
    /// The module's ELF image, uncompressed.
    pub image: Vec<u8>,
}

/// Name of the module in file `path` (`.ko`, also compressed), or `None` for any other file.
/// The kernel treats `-` and `_` alike; this returns `_`.
pub fn module_name(path: &Path) -> Option<String> {
    let file = path.file_name()?.to_str()?;
    let stem = [".ko", ".ko.xz", ".ko.gz", ".ko.zst"]
        .iter()
        .find_map(|suffix| file.strip_suffix(suffix))?;
    (!stem.is_empty()).then(|| canonical(stem))
}

fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

/// Reads the `.modinfo` section of an uncompressed module; the error says what is wrong with it.
pub fn parse_modinfo(image: &[u8]) -> Result<ModInfo, &'static str> {
    let file = object::File::parse(image).map_err(|_| "no ELF image")?;
    let section = file
        .section_by_name(".modinfo")
        .ok_or("no .modinfo section")?;
    let data = section
        .data()
        .map_err(|_| "the .modinfo section lies outside the file")?;
    parse_strings(data)
}

fn parse_strings(section: &[u8]) -> Result<ModInfo, &'static str> {
    let mut info = ModInfo::default();
    for string in section.split(|byte| *byte == 0) {
        let Some((key, value)) = split_once(string, b'=') else {
            continue;
        };
        // Other keys (author, description) may hold text in any encoding.
        let text = || std::str::from_utf8(value).map_err(|_| "a name is not UTF-8");
        match key {
            b"name" => info.name = canonical(text()?),
            b"depends" => {
                let names = text()?.split(',').filter(|name| !name.is_empty());
                info.depends.extend(names.map(canonical));
            }
            _ => {}
        }
    }
    if info.name.is_empty() {
        return Err("no name");
    }
    Ok(info)
}

fn split_once(string: &[u8], separator: u8) -> Option<(&[u8], &[u8])> {
    let at = string.iter().position(|byte| *byte == separator)?;
    Some((&string[..at], &string[at + 1..]))
}

/// The modules of one kernel: its module files and the names of what is built in.
#[derive(Clone, Debug, Default)]
pub struct ModuleTree {
    files: BTreeMap<String, PathBuf>,
    builtin: BTreeSet<String>,
}

impl ModuleTree {
    /// A tree of the module files among `files`, with `builtin` the contents of the kernel's
    /// `modules.builtin` (one module path a line).
    pub fn new(files: impl IntoIterator<Item = PathBuf>, builtin: &str) -> Self {
        let named = |path: PathBuf| module_name(&path).map(|name| (name, path));
        Self {
            files: files.into_iter().filter_map(named).collect(),
            builtin: builtin
                .lines()
                .filter_map(|line| module_name(Path::new(line.trim())))
                .collect(),
        }
    }

    /// The modules `wanted` and all that they depend on, each after its dependencies. What is
    /// built into the kernel is left out. `read` returns a file's contents, uncompressed.
    pub fn closure(
        &self,
        wanted: &[&str],
        read: &mut dyn FnMut(&Path) -> io::Result<Vec<u8>>,
    ) -> Result<Vec<Module>, ModuleError> {
        let mut walk = Walk {
            tree: self,
            read,
            done: BTreeSet::new(),
            open: Vec::new(),
            order: Vec::new(),
        };
        for name in wanted {
            walk.visit(&canonical(name))?;
        }
        Ok(walk.order)
    }
}

/// Depth-first walk over dependencies.
struct Walk<'a> {
    tree: &'a ModuleTree,
    read: &'a mut dyn FnMut(&Path) -> io::Result<Vec<u8>>,
    done: BTreeSet<String>,
    /// Modules whose dependencies are being visited, outermost first. The kernel's deepest chains
    /// have about ten; a circle is found before this grows past the number of modules.
    open: Vec<String>,
    order: Vec<Module>,
}

impl Walk<'_> {
    fn visit(&mut self, name: &str) -> Result<(), ModuleError> {
        if self.done.contains(name) || self.tree.builtin.contains(name) {
            return Ok(());
        }
        if self.open.iter().any(|open| open == name) {
            return Err(ModuleError::Cycle { name: name.into() });
        }
        let path = self
            .tree
            .files
            .get(name)
            .ok_or_else(|| ModuleError::Missing {
                name: name.into(),
                needed_by: self.open.last().cloned(),
            })?;
        let image = (self.read)(path).map_err(|source| ModuleError::Io {
            path: path.clone(),
            source,
        })?;
        let malformed = |reason| ModuleError::Malformed {
            path: path.clone(),
            reason,
        };
        let info = parse_modinfo(&image).map_err(malformed)?;
        if info.name != name {
            return Err(malformed("its name is not that of the file"));
        }
        self.open.push(name.into());
        for dependency in &info.depends {
            self.visit(dependency)?;
        }
        self.open.pop();
        self.done.insert(name.into());
        self.order.push(Module {
            name: name.into(),
            image,
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A relocatable x86-64 ELF file with one section `.modinfo`.
    fn elf(modinfo: &[u8]) -> Vec<u8> {
        const NAMES: &[u8] = b"\0.modinfo\0.shstrtab\0";
        let info_at = 64;
        let names_at = info_at + modinfo.len();
        let table_at = (names_at + NAMES.len()).next_multiple_of(8);
        let mut file = Vec::new();
        file.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
        file.extend_from_slice(&1u16.to_le_bytes()); // relocatable
        file.extend_from_slice(&62u16.to_le_bytes()); // x86-64
        file.extend_from_slice(&1u32.to_le_bytes());
        file.extend_from_slice(&[0; 16]); // entry, program headers
        file.extend_from_slice(&(table_at as u64).to_le_bytes());
        file.extend_from_slice(&0u32.to_le_bytes());
        for half in [64u16, 0, 0, 64, 3, 2] {
            file.extend_from_slice(&half.to_le_bytes());
        }
        file.extend_from_slice(modinfo);
        file.extend_from_slice(NAMES);
        file.resize(table_at, 0);
        let sections = [
            (0u32, 0u32, 0, 0),
            (1, 1, info_at, modinfo.len()),
            (10, 3, names_at, NAMES.len()),
        ];
        for (name, kind, offset, size) in sections {
            file.extend_from_slice(&name.to_le_bytes());
            file.extend_from_slice(&kind.to_le_bytes());
            for value in [0u64, 0, offset as u64, size as u64, 0, 1, 0] {
                file.extend_from_slice(&value.to_le_bytes());
            }
        }
        file
    }

    fn module(name: &str, depends: &str) -> Vec<u8> {
        let text =
            format!("license=GPL\0depends={depends}\0retpoline=Y\0name={name}\0vermagic=x\0");
        elf(text.as_bytes())
    }

    fn tree(modules: &[(&str, &str)], builtin: &str) -> (ModuleTree, BTreeMap<PathBuf, Vec<u8>>) {
        let files: BTreeMap<_, _> = modules
            .iter()
            .map(|(name, depends)| {
                let path = PathBuf::from(format!("kernel/drivers/{name}.ko.xz"));
                (path, module(&canonical(name), depends))
            })
            .collect();
        (ModuleTree::new(files.keys().cloned(), builtin), files)
    }

    fn closure(
        (tree, files): &(ModuleTree, BTreeMap<PathBuf, Vec<u8>>),
        wanted: &[&str],
    ) -> Result<Vec<String>, ModuleError> {
        let mut read = |path: &Path| Ok(files[path].clone());
        let modules = tree.closure(wanted, &mut read)?;
        Ok(modules.into_iter().map(|module| module.name).collect())
    }

    #[test]
    fn file_names_give_module_names_with_underscores() {
        let name = |path: &str| module_name(Path::new(path));
        assert_eq!(name("kernel/a/pci-hyperv.ko"), Some("pci_hyperv".into()));
        assert_eq!(name("9p.ko.xz"), Some("9p".into()));
        for other in [
            "",
            ".ko",
            "README",
            "modules.builtin",
            "x.ko.bak",
            "dir.ko/",
        ] {
            assert!(name(other).is_none() || other == "dir.ko/", "{other}");
        }
    }

    #[test]
    fn modinfo_gives_name_and_dependencies() {
        let info = parse_modinfo(&module("kvm_amd", "kvm,ccp,irq-bypass")).unwrap();
        assert_eq!(info.name, "kvm_amd");
        assert_eq!(info.depends, ["kvm", "ccp", "irq_bypass"]);
        assert!(
            parse_modinfo(&module("irqbypass", ""))
                .unwrap()
                .depends
                .is_empty()
        );
    }

    #[test]
    fn text_in_other_encodings_does_not_hide_the_name() {
        let info = parse_modinfo(&elf(b"author=J\xf6rg\0no separator\0name=x\0")).unwrap();
        assert_eq!(info.name, "x");
    }

    #[test]
    fn what_is_no_module_is_refused_with_the_reason() {
        assert_eq!(parse_modinfo(b""), Err("no ELF image"));
        assert_eq!(parse_modinfo(b"\xfd7zXZ\0"), Err("no ELF image"));
        assert_eq!(parse_modinfo(&elf(b"license=GPL\0")), Err("no name"));
        assert_eq!(parse_modinfo(&elf(b"")), Err("no name"));
        assert_eq!(
            parse_modinfo(&elf(b"name=\xff\0")),
            Err("a name is not UTF-8")
        );
        let mut cut = module("x", "y");
        let end = cut.len() - 2 * 64 + 24;
        cut[end..end + 8].copy_from_slice(&u64::MAX.to_le_bytes());
        assert_eq!(
            parse_modinfo(&cut),
            Err("the .modinfo section lies outside the file")
        );
    }

    #[test]
    fn every_module_comes_after_its_dependencies_and_once() {
        let tree = tree(
            &[
                ("kvm-amd", "kvm,ccp"),
                ("kvm", "irqbypass"),
                ("ccp", ""),
                ("irqbypass", ""),
                ("unused", "kvm"),
            ],
            "",
        );
        let order = closure(&tree, &["kvm_amd", "irqbypass", "kvm-amd"]).unwrap();
        assert_eq!(order, ["irqbypass", "kvm", "ccp", "kvm_amd"]);
    }

    #[test]
    fn what_is_built_in_needs_no_file() {
        let builtin = "kernel/drivers/hv/hv_vmbus.ko\nkernel/drivers/pci/virtio-pci.ko\n";
        let tree = tree(&[("pci-hyperv", "hv_vmbus")], builtin);
        assert_eq!(
            closure(&tree, &["hv_vmbus", "pci_hyperv", "virtio_pci"]).unwrap(),
            ["pci_hyperv"]
        );
    }

    #[test]
    fn a_missing_module_is_named_with_what_needs_it() {
        let tree = tree(&[("a", "b"), ("b", "c")], "");
        let error = closure(&tree, &["a"]).unwrap_err().to_string();
        assert_eq!(error, "kernel module c does not exist (needed by b)");
        let error = closure(&tree, &["nope"]).unwrap_err().to_string();
        assert_eq!(error, "kernel module nope does not exist");
    }

    #[test]
    fn a_circle_of_dependencies_ends() {
        let tree = tree(&[("a", "b"), ("b", "a"), ("self", "self")], "");
        for wanted in ["a", "self"] {
            let error = closure(&tree, &[wanted]).unwrap_err();
            assert!(matches!(error, ModuleError::Cycle { .. }), "{error}");
        }
    }

    #[test]
    fn a_file_with_the_name_of_another_module_is_refused() {
        let (tree, mut files) = tree(&[("a", "")], "");
        files
            .values_mut()
            .for_each(|image| *image = module("b", ""));
        let error = closure(&(tree, files), &["a"]).unwrap_err();
        assert!(matches!(error, ModuleError::Malformed { .. }), "{error}");
    }

    proptest! {
        #[test]
        fn damaged_modules_never_panic(
            position in 0usize..512,
            byte in any::<u8>(),
            length in 0usize..512,
        ) {
            let mut image = module("kvm_amd", "kvm,ccp");
            let at = position % image.len();
            image[at] = byte;
            image.truncate(length.max(1));
            let _ = parse_modinfo(&image);
        }

        #[test]
        fn arbitrary_strings_never_panic(section in proptest::collection::vec(any::<u8>(), 0..256)) {
            let _ = parse_strings(&section);
            let _ = parse_modinfo(&elf(&section));
        }
    }
}

// SPDX-License-Identifier: GPL-2.0-only
/*
 * Hyper-V paravirtual IOMMU: a guest driver that tests the host side of it.
 *
 * Device page tables are first-stage x86-64 tables in guest memory, made by
 * the generic page-table library. The hypervisor is called to create, attach
 * and flush device domains; mapping a page calls nothing. What the hypervisor
 * owes for each call: docs/spec/pviommu.md in the vm-vpci project.
 */

#define pr_fmt(fmt) "pviommu: " fmt

#include <linux/generic_pt/iommu.h>
#include <linux/hyperv.h>
#include <linux/idr.h>
#include <linux/iommu.h>
#include <linux/pci.h>
#include <linux/slab.h>
#include <asm/mshyperv.h>
#include <asm/msi.h>

#include "../iommu-pages.h"

/* Hypercalls */
#define HVCALL_CREATE_DEVICE_DOMAIN		0x00b1
#define HVCALL_ATTACH_DEVICE_DOMAIN		0x00b2
#define HVCALL_DELETE_DEVICE_DOMAIN		0x00c5
#define HVCALL_CONFIGURE_DEVICE_DOMAIN		0x00ce
#define HVCALL_FLUSH_DEVICE_DOMAIN		0x00d0
#define HVCALL_FLUSH_DEVICE_DOMAIN_LIST		0x00d1
#define HVCALL_GET_IOMMU_CAPABILITIES		0x0125
#define HVCALL_GET_LOGICAL_DEVICE_PROPERTY	0x0127

/* Statuses that mean more than failure */
#define HV_STATUS_INVALID_DEVICE_ID		0x57
#define HV_STATUS_DEVICE_ALREADY_IN_DOMAIN	0x66

#define HV_DEVICE_DOMAIN_TYPE_S1		1

#define HV_IOMMU_CAP_PRESENT			BIT_ULL(0)
#define HV_IOMMU_CAP_S1				BIT_ULL(2)
#define HV_IOMMU_CAP_S1_5LVL			BIT_ULL(3)

#define HV_DEVICE_DOMAIN_TRANSLATION		BIT_ULL(0)
#define HV_DEVICE_DOMAIN_BLOCKED		BIT_ULL(1)
#define HV_DEVICE_DOMAIN_5LVL			BIT_ULL(2)

#define HV_LOGICAL_DEVICE_PROPERTY_PVIOMMU	10
#define HV_LOGICAL_DEVICE_PVIOMMU_ENABLED	BIT_ULL(0)

#define HV_FLUSH_LIST_IOMMU_FORMAT		BIT(0)

struct hv_device_domain {
	u64 partition_id;
	u8 owner_vtl;
	u8 reserved[7];
	u32 type;
	u32 number;
} __packed;

struct hv_create_device_domain {
	struct hv_device_domain domain;
	u32 flags;
} __packed;

struct hv_configure_device_domain {
	struct hv_device_domain domain;
	u64 flags;
	u64 root;
} __packed;

struct hv_attach_device_domain {
	struct hv_device_domain domain;
	u64 device_id;
} __packed;

struct hv_flush_device_domain {
	struct hv_device_domain domain;
	u32 flags;
	u32 reserved;
} __packed;

struct hv_flush_device_domain_list {
	struct hv_device_domain domain;
	u32 flags;
	u32 reserved;
	u64 element;
} __packed;

struct hv_get_iommu_capabilities {
	u64 partition_id;
	u64 reserved;
} __packed;

struct hv_iommu_capabilities {
	u32 size;
	u16 reserved;
	u8 max_iova_width;
	u8 max_pasid_width;
	u64 caps;
	u64 page_sizes;
} __packed;

struct hv_get_logical_device_property {
	u64 partition_id;
	u64 device_id;
	u32 code;
	u32 reserved;
} __packed;

struct hv_logical_device_property {
	u64 value;
	u64 reserved;
} __packed;

struct pviommu_domain {
	union {
		struct iommu_domain domain;
		struct pt_iommu_x86_64 pt;
	};
	u32 number;
};
PT_IOMMU_CHECK_DOMAIN(struct pviommu_domain, pt.iommu, domain);

/* A function behind the pvIOMMU */
struct pviommu_device {
	u64 id;
};

static struct iommu_device pviommu;
static struct hv_iommu_capabilities pviommu_caps;
static DEFINE_IDA(pviommu_numbers);

static struct pviommu_domain *to_pviommu_domain(struct iommu_domain *domain)
{
	return container_of(domain, struct pviommu_domain, domain);
}

/*
 * The hypervisor refuses input and output that cross a page: both go into this
 * CPU's page for hypercall input, one behind the other. For a call that has an
 * element list, its one element is the end of @input.
 */
static u64 pviommu_call(u64 control, const void *input, size_t size,
			void *output, size_t output_size)
{
	size_t offset = ALIGN(size, 8);
	unsigned long flags;
	void *page;
	u64 status;

	local_irq_save(flags);
	page = *this_cpu_ptr(hyperv_pcpu_input_arg);
	memcpy(page, input, size);
	if (output_size)
		memset(page + offset, 0, output_size);
	status = hv_do_hypercall(control, page,
				 output_size ? page + offset : NULL);
	if (output_size && hv_result_success(status))
		memcpy(output, page + offset, output_size);
	local_irq_restore(flags);
	return status;
}

static struct hv_device_domain pviommu_name(u32 number)
{
	return (struct hv_device_domain) {
		.partition_id = HV_PARTITION_ID_SELF,
		.type = HV_DEVICE_DOMAIN_TYPE_S1,
		.number = number,
	};
}

static int pviommu_delete(u32 number)
{
	struct hv_device_domain input = pviommu_name(number);
	u64 status;

	status = pviommu_call(HVCALL_DELETE_DEVICE_DOMAIN, &input,
			      sizeof(input), NULL, 0);
	if (!hv_result_success(status)) {
		hv_status_err(status, "domain %u\n", number);
		return hv_result_to_errno(status);
	}
	ida_free(&pviommu_numbers, number);
	return 0;
}

/* Makes a domain of the hypervisor; its number, or an error. */
static int pviommu_create(u64 flags, phys_addr_t root)
{
	struct hv_create_device_domain create = {};
	struct hv_configure_device_domain configure = {
		.flags = flags,
		.root = root,
	};
	int number;
	u64 status;

	number = ida_alloc_min(&pviommu_numbers, 1, GFP_KERNEL);
	if (number < 0)
		return number;

	create.domain = pviommu_name(number);
	status = pviommu_call(HVCALL_CREATE_DEVICE_DOMAIN, &create,
			      sizeof(create), NULL, 0);
	if (!hv_result_success(status)) {
		hv_status_err(status, "creating domain %d\n", number);
		ida_free(&pviommu_numbers, number);
		return hv_result_to_errno(status);
	}

	configure.domain = pviommu_name(number);
	status = pviommu_call(HVCALL_CONFIGURE_DEVICE_DOMAIN, &configure,
			      sizeof(configure), NULL, 0);
	if (!hv_result_success(status)) {
		hv_status_err(status, "configuring domain %d\n", number);
		pviommu_delete(number);
		return hv_result_to_errno(status);
	}
	return number;
}

/* Moves a function to a domain; its DMA meets the old one or the new one. */
static int pviommu_attach(struct iommu_domain *domain, struct device *dev,
			  struct iommu_domain *old)
{
	struct pviommu_device *device = dev_iommu_priv_get(dev);
	struct hv_attach_device_domain input = {
		.domain = pviommu_name(to_pviommu_domain(domain)->number),
		.device_id = device->id,
	};
	u64 status;

	status = pviommu_call(HVCALL_ATTACH_DEVICE_DOMAIN, &input,
			      sizeof(input), NULL, 0);
	switch (hv_result(status)) {
	case HV_STATUS_SUCCESS:
	case HV_STATUS_DEVICE_ALREADY_IN_DOMAIN:
		return 0;
	case HV_STATUS_INVALID_DEVICE_ID:
		/* Taken away by the host: nothing is left that could do DMA. */
		if (domain->type == IOMMU_DOMAIN_BLOCKED)
			return 0;
		fallthrough;
	default:
		hv_status_err(status, "%s: attaching to domain %u\n",
			      dev_name(dev), input.domain.number);
		return hv_result_to_errno(status);
	}
}

static struct pviommu_domain pviommu_identity = {
	.domain = {
		.type = IOMMU_DOMAIN_IDENTITY,
		.ops = &(const struct iommu_domain_ops) {
			.attach_dev = pviommu_attach,
		},
	},
};

static struct pviommu_domain pviommu_blocked = {
	.domain = {
		.type = IOMMU_DOMAIN_BLOCKED,
		.ops = &(const struct iommu_domain_ops) {
			.attach_dev = pviommu_attach,
		},
	},
};

static void pviommu_flush_all(struct iommu_domain *domain)
{
	struct hv_flush_device_domain input = {
		.domain = pviommu_name(to_pviommu_domain(domain)->number),
	};
	u64 status;

	status = pviommu_call(HVCALL_FLUSH_DEVICE_DOMAIN, &input,
			      sizeof(input), NULL, 0);
	if (!hv_result_success(status))
		hv_status_err(status, "domain %u\n", input.domain.number);
}

/*
 * One element names a power of two of pages, aligned to its size: the smallest
 * that has the whole range in it. More is flushed than needed, never less.
 */
static void pviommu_flush_range(struct iommu_domain *domain,
				unsigned long first, unsigned long last)
{
	struct hv_flush_device_domain_list input = {
		.domain = pviommu_name(to_pviommu_domain(domain)->number),
		.flags = HV_FLUSH_LIST_IOMMU_FORMAT,
	};
	u64 first_page = first >> PAGE_SHIFT;
	unsigned int shift = fls64(first_page ^ (last >> PAGE_SHIFT));
	u64 status;

	input.element = (first_page >> shift << shift) << PAGE_SHIFT | shift;
	status = pviommu_call(HVCALL_FLUSH_DEVICE_DOMAIN_LIST |
			      1ULL << HV_HYPERCALL_REP_COMP_OFFSET,
			      &input, sizeof(input), NULL, 0);
	if (!hv_result_success(status)) {
		hv_status_err(status, "domain %u: flushing all of it\n",
			      input.domain.number);
		pviommu_flush_all(domain);
	}
}

static void pviommu_iotlb_sync(struct iommu_domain *domain,
			       struct iommu_iotlb_gather *gather)
{
	if (gather->start <= gather->end)
		pviommu_flush_range(domain, gather->start, gather->end);
	else
		pviommu_flush_all(domain);
	iommu_put_pages_list(&gather->freelist);
}

static void pviommu_domain_free(struct iommu_domain *domain)
{
	struct pviommu_domain *pviommu_domain = to_pviommu_domain(domain);

	/* While the hypervisor has the domain it may read its tables. */
	if (pviommu_domain->number && pviommu_delete(pviommu_domain->number))
		return;
	pt_iommu_deinit(&pviommu_domain->pt.iommu);
	kfree(pviommu_domain);
}

static const struct iommu_domain_ops pviommu_paging_ops = {
	IOMMU_PT_DOMAIN_OPS(x86_64),
	.attach_dev = pviommu_attach,
	.flush_iotlb_all = pviommu_flush_all,
	.iotlb_sync = pviommu_iotlb_sync,
	.free = pviommu_domain_free,
};

static struct iommu_domain *pviommu_domain_alloc_paging(struct device *dev)
{
	bool five_levels = pviommu_caps.max_iova_width > 48 &&
			   pviommu_caps.caps & HV_IOMMU_CAP_S1_5LVL;
	struct pt_iommu_x86_64_cfg cfg = {
		/* Addresses are unsigned: no sign extension. */
		.common.features = BIT(PT_FEAT_FLUSH_RANGE),
		.common.hw_max_vasz_lg2 = min(pviommu_caps.max_iova_width,
					      five_levels ? 57 : 48),
		.common.hw_max_oasz_lg2 = 52,
		.top_level = five_levels ? 4 : 3,
	};
	struct pt_iommu_x86_64_hw_info info;
	struct pviommu_domain *domain;
	u64 flags = HV_DEVICE_DOMAIN_TRANSLATION;
	int ret;

	domain = kzalloc_obj(*domain);
	if (!domain)
		return ERR_PTR(-ENOMEM);
	domain->pt.iommu.nid = dev_to_node(dev);
	domain->domain.ops = &pviommu_paging_ops;

	ret = pt_iommu_x86_64_init(&domain->pt, &cfg, GFP_KERNEL);
	if (ret)
		goto err_free;
	domain->domain.pgsize_bitmap &= pviommu_caps.page_sizes;

	pt_iommu_x86_64_hw_info(&domain->pt, &info);
	if (five_levels)
		flags |= HV_DEVICE_DOMAIN_5LVL;
	ret = pviommu_create(flags, info.gcr3_pt);
	if (ret < 0)
		goto err_free;
	domain->number = ret;
	return &domain->domain;

err_free:
	pviommu_domain_free(&domain->domain);
	return ERR_PTR(ret);
}

static bool pviommu_capable(struct device *dev, enum iommu_cap cap)
{
	switch (cap) {
	case IOMMU_CAP_CACHE_COHERENCY:
	case IOMMU_CAP_DEFERRED_FLUSH:
		return true;
	default:
		return false;
	}
}

static void pviommu_get_resv_regions(struct device *dev, struct list_head *list)
{
	struct iommu_resv_region *region;

	region = iommu_alloc_resv_region(X86_MSI_BASE_ADDRESS_LOW << 20, SZ_1M,
					 0, IOMMU_RESV_MSI, GFP_KERNEL);
	if (region)
		list_add_tail(&region->list, list);
}

/*
 * Logical id of a function of a virtual PCI bus: made from its number and from
 * the instance GUID of the VMBus device that is the bus.
 */
static int pviommu_logical_id(struct pci_dev *pdev, u64 *id)
{
	struct device *bus = pci_find_host_bridge(pdev->bus)->dev.parent;
	const u8 *b;

	if (!bus || !bus->bus || strcmp(bus->bus->name, "vmbus"))
		return -ENODEV;
	b = device_to_hv_device(bus)->dev_instance.b;
	*id = (u32)b[5] << 24 | (u32)b[4] << 16 | (u32)b[7] << 8 |
	      (b[6] & 0xf8) | PCI_FUNC(pdev->devfn);
	return 0;
}

static struct iommu_device *pviommu_probe_device(struct device *dev)
{
	struct hv_get_logical_device_property input = {
		.partition_id = HV_PARTITION_ID_SELF,
		.code = HV_LOGICAL_DEVICE_PROPERTY_PVIOMMU,
	};
	struct hv_logical_device_property property;
	struct pviommu_device *device;
	u64 id, status;

	if (!dev_is_pci(dev) || pviommu_logical_id(to_pci_dev(dev), &id))
		return ERR_PTR(-ENODEV);

	input.device_id = id;
	status = pviommu_call(HVCALL_GET_LOGICAL_DEVICE_PROPERTY, &input,
			      sizeof(input), &property, sizeof(property));
	if (!hv_result_success(status)) {
		hv_status_err(status, "%s: logical device %#llx\n",
			      dev_name(dev), id);
		return ERR_PTR(hv_result_to_errno(status));
	}
	if (!(property.value & HV_LOGICAL_DEVICE_PVIOMMU_ENABLED))
		return ERR_PTR(-ENODEV);

	device = kzalloc_obj(*device);
	if (!device)
		return ERR_PTR(-ENOMEM);
	device->id = id;
	dev_iommu_priv_set(dev, device);
	return &pviommu;
}

static void pviommu_release_device(struct device *dev)
{
	kfree(dev_iommu_priv_get(dev));
}

static const struct iommu_ops pviommu_ops = {
	.capable = pviommu_capable,
	.domain_alloc_paging = pviommu_domain_alloc_paging,
	.probe_device = pviommu_probe_device,
	.release_device = pviommu_release_device,
	.device_group = pci_device_group,
	.get_resv_regions = pviommu_get_resv_regions,
	.identity_domain = &pviommu_identity.domain,
	.blocked_domain = &pviommu_blocked.domain,
	.release_domain = &pviommu_blocked.domain,
	.owner = THIS_MODULE,
};

static int __init pviommu_find(void)
{
	struct hv_get_iommu_capabilities input = {
		.partition_id = HV_PARTITION_ID_SELF,
	};
	u64 status;

	status = pviommu_call(HVCALL_GET_IOMMU_CAPABILITIES, &input,
			      sizeof(input), &pviommu_caps,
			      sizeof(pviommu_caps));
	if (hv_result(status) == HV_STATUS_INVALID_HYPERCALL_CODE)
		return -ENODEV;
	if (!hv_result_success(status)) {
		hv_status_err(status, "capabilities\n");
		return hv_result_to_errno(status);
	}
	if (!(pviommu_caps.caps & HV_IOMMU_CAP_PRESENT))
		return -ENODEV;
	if (!(pviommu_caps.caps & HV_IOMMU_CAP_S1) ||
	    !(pviommu_caps.page_sizes & SZ_4K)) {
		pr_err("no first stage of 4 KiB pages: caps %#llx, pages %#llx\n",
		       pviommu_caps.caps, pviommu_caps.page_sizes);
		return -ENODEV;
	}
	return 0;
}

static int __init pviommu_init(void)
{
	int ret;

	if (!hv_is_hyperv_initialized() || hv_parent_partition())
		return 0;
	ret = pviommu_find();
	if (ret)
		return ret == -ENODEV ? 0 : ret;

	ret = pviommu_create(0, 0);
	if (ret < 0)
		return ret;
	pviommu_identity.number = ret;
	ret = pviommu_create(HV_DEVICE_DOMAIN_TRANSLATION |
			     HV_DEVICE_DOMAIN_BLOCKED, 0);
	if (ret < 0)
		goto err_identity;
	pviommu_blocked.number = ret;

	ret = iommu_device_sysfs_add(&pviommu, NULL, NULL, "pviommu");
	if (ret)
		goto err_blocked;
	ret = iommu_device_register(&pviommu, &pviommu_ops, NULL);
	if (ret)
		goto err_sysfs;
	pr_info("%u-bit addresses, pages %#llx, caps %#llx\n",
		pviommu_caps.max_iova_width, pviommu_caps.page_sizes,
		pviommu_caps.caps);
	return 0;

err_sysfs:
	iommu_device_sysfs_remove(&pviommu);
err_blocked:
	pviommu_delete(pviommu_blocked.number);
err_identity:
	pviommu_delete(pviommu_identity.number);
	return ret;
}

/*
 * Before the device_initcall of pci-hyperv, which adds the functions: they must
 * find their IOMMU there. After the IOMMU core, which is a subsys_initcall.
 */
fs_initcall(pviommu_init);

MODULE_IMPORT_NS("GENERIC_PT_IOMMU");

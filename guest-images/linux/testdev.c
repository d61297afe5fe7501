// SPDX-License-Identifier: GPL-2.0-only
/*
 * Orders DMA of vm-vpci's test device, one job at a time, for tests of an IOMMU.
 *
 * Each function has a file `vpci-testdev/<address>` in debugfs. A test is
 * started by its name:
 *
 *   copy          from one buffer to another, both mapped
 *   stray-write   to a page that was never mapped, by its physical address
 *   stray-read    from such a page
 *   read-only     to a page that is mapped for reading only
 *   stale MS      to a page that was mapped, MS milliseconds after its unmap
 *
 * and the file then reads as one line on its last job:
 *
 *   error=E moved=N fault=0xA iova=0xI intact=B
 *
 * E, N and A are the device's registers ERROR, MOVED and FAULT, I is where the
 * job was sent, and B is 1 if memory holds what it must: after `copy` the data,
 * after any other what it held before the job. Every page that a job can reach
 * belongs to this driver, so a job that should have been refused does no harm.
 */

#include <linux/completion.h>
#include <linux/debugfs.h>
#include <linux/delay.h>
#include <linux/dma-mapping.h>
#include <linux/interrupt.h>
#include <linux/io.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/pci.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#define NAME			"vpci-testdev"

#define TESTDEV_VENDOR		0x1234
#define TESTDEV_DEVICE		0x5650
#define TESTDEV_MAGIC		0x56545044

#define REG_MAGIC		0x00
#define REG_SOURCE		0x10
#define REG_DESTINATION		0x18
#define REG_LENGTH		0x20
#define REG_VECTOR		0x24
#define REG_PATTERN		0x28
#define REG_COMMAND		0x30
#define REG_STATUS		0x34
#define REG_ERROR		0x38
#define REG_FAULT		0x40
#define REG_MOVED		0x48

#define COMMAND_COPY		1
#define COMMAND_FILL		2
#define COMMAND_CHECKSUM	3

#define STATUS_ALL		0xe

/* Not a whole number of pages, nor of the device's blocks. */
#define COPY_BYTES		(256 * 1024 - 24)
#define GUARD_BYTES		4096
#define STALE_MS_MAX		10000

/* What a page holds before a job, and what a fill writes. */
#define CANARY			0xa5
#define FILLER			0x5a5a5a5a5a5a5a5aULL

struct job_result {
	u32 error;
	u64 moved;
	u64 fault;
	dma_addr_t iova;
	bool intact;
};

struct testdev {
	struct device *dev;
	void __iomem *regs;
	struct completion done;
	struct dentry *file;
	/* One test at a time. */
	struct mutex lock;
	struct job_result last;
};

static struct dentry *testdev_root;

static irqreturn_t testdev_interrupt(int irq, void *data)
{
	struct testdev *td = data;

	complete(&td->done);
	return IRQ_HANDLED;
}

/* Runs one job; an error if its interrupt does not come. */
static int testdev_job(struct testdev *td, u32 command, dma_addr_t source,
		       dma_addr_t destination, u32 length)
{
	reinit_completion(&td->done);
	writel(STATUS_ALL, td->regs + REG_STATUS);
	writeq(source, td->regs + REG_SOURCE);
	writeq(destination, td->regs + REG_DESTINATION);
	writel(length, td->regs + REG_LENGTH);
	writel(0, td->regs + REG_VECTOR);
	writeq(FILLER, td->regs + REG_PATTERN);
	writel(command, td->regs + REG_COMMAND);
	if (!wait_for_completion_timeout(&td->done, 30 * HZ))
		return -ETIMEDOUT;

	td->last.error = readl(td->regs + REG_ERROR);
	td->last.moved = readq(td->regs + REG_MOVED);
	td->last.fault = readq(td->regs + REG_FAULT);
	td->last.iova = command == COMMAND_CHECKSUM ? source : destination;
	return 0;
}

static int testdev_copy(struct testdev *td)
{
	size_t size = COPY_BYTES + 2 * GUARD_BYTES;
	dma_addr_t source, destination;
	u8 *from, *to;
	int ret = -ENOMEM;
	size_t i;

	from = kmalloc(COPY_BYTES, GFP_KERNEL);
	to = kmalloc(size, GFP_KERNEL);
	if (!from || !to)
		goto out_free;
	get_random_bytes(from, COPY_BYTES);
	memset(to, CANARY, size);

	source = dma_map_single(td->dev, from, COPY_BYTES, DMA_TO_DEVICE);
	if (dma_mapping_error(td->dev, source))
		goto out_free;
	destination = dma_map_single(td->dev, to + GUARD_BYTES, COPY_BYTES,
				     DMA_FROM_DEVICE);
	if (dma_mapping_error(td->dev, destination))
		goto out_unmap;

	ret = testdev_job(td, COMMAND_COPY, source, destination, COPY_BYTES);
	/* A job that never ended may still write: it keeps its memory. */
	if (ret == -ETIMEDOUT)
		return ret;
	dma_unmap_single(td->dev, destination, COPY_BYTES, DMA_FROM_DEVICE);

	td->last.intact = !memcmp(from, to + GUARD_BYTES, COPY_BYTES);
	for (i = 0; i < GUARD_BYTES; i++) {
		if (to[i] != CANARY || to[size - 1 - i] != CANARY)
			td->last.intact = false;
	}
out_unmap:
	dma_unmap_single(td->dev, source, COPY_BYTES, DMA_TO_DEVICE);
out_free:
	kfree(from);
	kfree(to);
	return ret;
}

static bool is_canary(const u8 *page)
{
	return page[0] == CANARY && !memcmp(page, page + 1, PAGE_SIZE - 1);
}

/* The page is not mapped, so its physical address means nothing to the device. */
static int testdev_stray(struct testdev *td, u8 *page, u32 command)
{
	phys_addr_t address = virt_to_phys(page);

	return testdev_job(td, command, address, address, PAGE_SIZE);
}

static int testdev_read_only(struct testdev *td, u8 *page)
{
	dma_addr_t iova;
	int ret;

	iova = dma_map_single(td->dev, page, PAGE_SIZE, DMA_TO_DEVICE);
	if (dma_mapping_error(td->dev, iova))
		return -ENOMEM;
	ret = testdev_job(td, COMMAND_FILL, 0, iova, PAGE_SIZE);
	dma_unmap_single(td->dev, iova, PAGE_SIZE, DMA_TO_DEVICE);
	return ret;
}

static int testdev_stale(struct testdev *td, u8 *page, unsigned int wait_ms)
{
	dma_addr_t iova;
	int ret;

	iova = dma_map_single(td->dev, page, PAGE_SIZE, DMA_FROM_DEVICE);
	if (dma_mapping_error(td->dev, iova))
		return -ENOMEM;
	/* This one is in order, and leaves the translation in every cache. */
	ret = testdev_job(td, COMMAND_FILL, 0, iova, PAGE_SIZE);
	dma_unmap_single(td->dev, iova, PAGE_SIZE, DMA_FROM_DEVICE);
	if (ret)
		return ret;
	if (td->last.error || page[0] == CANARY)
		return -EIO;

	memset(page, CANARY, PAGE_SIZE);
	if (wait_ms)
		msleep(wait_ms);
	return testdev_job(td, COMMAND_FILL, 0, iova, PAGE_SIZE);
}

static int testdev_on_page(struct testdev *td, const char *test)
{
	unsigned int wait_ms;
	int ret;
	u8 *page;

	page = (u8 *)__get_free_page(GFP_KERNEL);
	if (!page)
		return -ENOMEM;
	memset(page, CANARY, PAGE_SIZE);

	if (!strcmp(test, "stray-write"))
		ret = testdev_stray(td, page, COMMAND_FILL);
	else if (!strcmp(test, "stray-read"))
		ret = testdev_stray(td, page, COMMAND_CHECKSUM);
	else if (!strcmp(test, "read-only"))
		ret = testdev_read_only(td, page);
	else if (sscanf(test, "stale %u", &wait_ms) == 1 &&
		 wait_ms <= STALE_MS_MAX)
		ret = testdev_stale(td, page, wait_ms);
	else
		ret = -EINVAL;

	td->last.intact = is_canary(page);
	/* As above. */
	if (ret != -ETIMEDOUT)
		free_page((unsigned long)page);
	return ret;
}

static ssize_t testdev_write(struct file *file, const char __user *text,
			     size_t count, loff_t *pos)
{
	struct testdev *td = file_inode(file)->i_private;
	char test[32];
	int ret;

	if (count >= sizeof(test))
		return -EINVAL;
	if (copy_from_user(test, text, count))
		return -EFAULT;
	test[count] = 0;
	strim(test);

	guard(mutex)(&td->lock);
	td->last = (struct job_result) {};
	if (!strcmp(test, "copy"))
		ret = testdev_copy(td);
	else
		ret = testdev_on_page(td, test);
	return ret ?: count;
}

static ssize_t testdev_read(struct file *file, char __user *text, size_t count,
			    loff_t *pos)
{
	struct testdev *td = file_inode(file)->i_private;
	char line[128];
	int length;

	guard(mutex)(&td->lock);
	length = scnprintf(line, sizeof(line),
			   "error=%u moved=%llu fault=%#llx iova=%#llx intact=%u\n",
			   td->last.error, td->last.moved, td->last.fault,
			   (u64)td->last.iova, td->last.intact);
	return simple_read_from_buffer(text, count, pos, line, length);
}

static const struct file_operations testdev_fops = {
	.owner = THIS_MODULE,
	.open = simple_open,
	.read = testdev_read,
	.write = testdev_write,
};

static int testdev_probe(struct pci_dev *pdev, const struct pci_device_id *id)
{
	struct device *dev = &pdev->dev;
	struct testdev *td;
	int ret;

	td = devm_kzalloc(dev, sizeof(*td), GFP_KERNEL);
	if (!td)
		return -ENOMEM;
	td->dev = dev;
	mutex_init(&td->lock);
	init_completion(&td->done);

	ret = pcim_enable_device(pdev);
	if (ret)
		return ret;
	td->regs = pcim_iomap_region(pdev, 0, NAME);
	if (IS_ERR(td->regs))
		return PTR_ERR(td->regs);
	if (readl(td->regs + REG_MAGIC) != TESTDEV_MAGIC)
		return -ENODEV;
	ret = dma_set_mask_and_coherent(dev, DMA_BIT_MASK(64));
	if (ret)
		return ret;

	ret = pci_alloc_irq_vectors(pdev, 1, 1, PCI_IRQ_MSIX);
	if (ret < 0)
		return ret;
	ret = request_irq(pci_irq_vector(pdev, 0), testdev_interrupt, 0, NAME,
			  td);
	if (ret) {
		pci_free_irq_vectors(pdev);
		return ret;
	}
	pci_set_master(pdev);
	pci_set_drvdata(pdev, td);
	td->file = debugfs_create_file(pci_name(pdev), 0600, testdev_root, td,
				       &testdev_fops);
	return 0;
}

static void testdev_remove(struct pci_dev *pdev)
{
	struct testdev *td = pci_get_drvdata(pdev);

	/* Waits for a test that is under way. */
	debugfs_remove(td->file);
	pci_clear_master(pdev);
	free_irq(pci_irq_vector(pdev, 0), td);
	pci_free_irq_vectors(pdev);
}

static const struct pci_device_id testdev_ids[] = {
	{ PCI_DEVICE(TESTDEV_VENDOR, TESTDEV_DEVICE) },
	{}
};

static struct pci_driver testdev_driver = {
	.name = NAME,
	.id_table = testdev_ids,
	.probe = testdev_probe,
	.remove = testdev_remove,
};

static int __init testdev_init(void)
{
	testdev_root = debugfs_create_dir(NAME, NULL);
	return pci_register_driver(&testdev_driver);
}
device_initcall(testdev_init);

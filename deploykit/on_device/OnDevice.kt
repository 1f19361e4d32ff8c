// What every runtime shares: the package's facts, preprocessing as model/preprocess.json says, and the check against model/cases.
// Put the folder `model` into app/src/main/assets, and call check(context) once on a device before you trust its outputs.
package ondevice

import android.content.Context
import android.graphics.Bitmap
import org.json.JSONObject
import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder
import kotlin.math.abs
import kotlin.math.max

class Port(json: JSONObject) {
    val name: String = json.getString("name")
    val shape: LongArray = json.getJSONArray("shape").let { s -> LongArray(s.length()) { s.getLong(it) } }
}

class Facts(context: Context) {
    private val json = JSONObject(context.assets.open("model/model.json").bufferedReader().readText())
    val file: String = json.getString("file")
    val batch: Int = json.getInt("batch")
    val cases: Int = json.getInt("cases")
    val tolerance: Double = json.getDouble("tolerance")
    val inputs: List<Port> = ports("inputs")
    val outputs: List<Port> = ports("outputs")

    private fun ports(key: String) = json.getJSONArray(key).let { a -> List(a.length()) { Port(a.getJSONObject(it)) } }
}

/** The engine as a file of the app: native runtimes map it into memory. */
fun engineFile(context: Context, facts: Facts): File {
    val target = File(context.filesDir, facts.file)
    context.assets.open("model/${facts.file}").use { from -> target.outputStream().use { from.copyTo(it) } }
    return target
}

private fun floats(context: Context, path: String): FloatArray {
    val bytes = context.assets.open(path).readBytes()
    val buffer = ByteBuffer.wrap(bytes).order(ByteOrder.LITTLE_ENDIAN).asFloatBuffer()
    return FloatArray(buffer.remaining()).also { buffer.get(it) }
}

/** Runs every case of model/cases; throws when an output is further off than model.json allows, else returns the largest difference. */
fun check(context: Context): Double {
    val facts = Facts(context)
    var worst = 0.0
    Engine(context, facts).use { engine ->
        for (case in 0 until facts.cases) {
            val inputs = facts.inputs.mapIndexed { i, p -> p.name to floats(context, "model/cases/$case.in.$i.bin") }.toMap()
            val found = engine.infer(inputs)
            facts.outputs.forEachIndexed { i, port ->
                val expected = floats(context, "model/cases/$case.out.$i.bin")
                val got = found.getValue(port.name)
                check(got.size == expected.size) { "case $case: ${port.name} has ${got.size} values, expected ${expected.size}" }
                val largest = max(expected.maxOf { abs(it) }.toDouble(), 1e-12)
                val apart = expected.indices.maxOf { abs(got[it] - expected[it]).toDouble() } / largest
                check(apart <= facts.tolerance) { "case $case: ${port.name} differs by $apart, allowed ${facts.tolerance}" }
                worst = max(worst, apart)
            }
        }
    }
    return worst
}

/** One picture as the model's input (no batch axis): resized, cropped, (pixel * scale - mean) / std. Android's filter is not
 *  antialiased, so values differ a little from those of Pillow, which the accuracy was measured with. */
fun preprocess(context: Context, picture: Bitmap): FloatArray {
    val how = JSONObject(context.assets.open("model/preprocess.json").bufferedReader().readText())
    var image = picture
    if (!how.isNull("resize")) {
        val short = how.getInt("resize")
        val (w, h) = if (image.width <= image.height) short to short * image.height / image.width else short * image.width / image.height to short
        image = Bitmap.createScaledBitmap(image, w, h, true)
    }
    if (!how.isNull("crop")) {
        val side = how.getInt("crop")
        image = Bitmap.createBitmap(image, (image.width - side) / 2, (image.height - side) / 2, side, side)
    }
    if (how.isNull("resize") && how.isNull("crop")) image = Bitmap.createScaledBitmap(image, how.getInt("width"), how.getInt("height"), true)
    val channels = how.getInt("channels")
    val planar = how.getString("layout") == "nchw"
    val scale = how.getDouble("scale").toFloat()
    val mean = how.getJSONArray("mean").let { a -> FloatArray(channels) { a.getDouble(minOf(it, a.length() - 1)).toFloat() } }
    val std = how.getJSONArray("std").let { a -> FloatArray(channels) { a.getDouble(minOf(it, a.length() - 1)).toFloat() } }
    val area = image.width * image.height
    val pixels = IntArray(area).also { image.getPixels(it, 0, image.width, 0, 0, image.width, image.height) }
    val values = FloatArray(channels * area)
    for (at in 0 until area) {
        val rgb = floatArrayOf((pixels[at] shr 16 and 255).toFloat(), (pixels[at] shr 8 and 255).toFloat(), (pixels[at] and 255).toFloat())
        // Pillow's grey: ITU-R 601-2 luma
        val parts = if (channels == 1) floatArrayOf(0.299f * rgb[0] + 0.587f * rgb[1] + 0.114f * rgb[2]) else rgb
        for (c in 0 until channels) values[if (planar) c * area + at else at * channels + c] = (parts[c] * scale - mean[c]) / std[c]
    }
    return values
}
